# What Python asks of OpenMP. Its number of threads belongs to each thread of the process:
# `omp_set_num_threads`, which threadpoolctl and PyTorch call, is for the caller alone.

cdef int usual_threads = 0          # nothing counts as lowered yet


def note_usual_threads():
    """Remember this thread's number as the usual one: called in a thread that nobody limited."""
    global usual_threads
    usual_threads = team_default()


def limited(int threads):
    """How many of so many threads a call in this thread may use."""
    return team_limit(threads, usual_threads)


def dismiss_threads():
    """End the OpenMP threads that wait for this thread's next call, which starts new ones."""
    with nogil:
        team_dismiss()
