"""Running a model: all or nothing, interrupts, worker threads, processes, sharded parameters, offloading."""
