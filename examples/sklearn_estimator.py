"""A network whose fit is one closed-form pass: `pip install 'sylinit[sklearn]'`."""

from sklearn.datasets import load_wine
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from sylinit.integrations.sklearn import SylvesterClassifier

x, y = load_wine(return_X_y=True)
train, test, known, asked = train_test_split(x, y, random_state=0)

classifier = SylvesterClassifier().fit(train, known)  # no gradient was computed
print(classifier.report_)
print(f"accuracy {classifier.score(test, asked):.1%}, first probabilities {classifier.predict_proba(test)[0].round(2)}")

pipeline = make_pipeline(QuantileTransformer(n_quantiles=20), SylvesterClassifier(code="pca"))
scores = cross_val_score(pipeline, x, y, cv=3)
assert classifier.score(test, asked) > 0.9
assert scores.mean() > 0.9
