"""Forks, again and again, in each of the ways in which a child could hang.

    python tests/attacks/forks.py --forks 1000

While Python threads compute, processes are forked in the main thread and in others, and children
compute, fork again, start threads, or return from the thread that forked them. A child hangs that
does not end within `--patience` seconds; it is killed and counted. Children's bits are compared
with the parent's.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time

import numpy as np

import fastbn

SAME, OTHER_BITS, HANGS = 0, 3, "hangs"
X = (np.arange(40009 * 8) * 7919 % 40009 / 1024).reshape(40009, 8)


def bits():
    y, m = fastbn.batch_norm(X)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, X, m)
    return b"".join(a.tobytes() for a in (y, m.mean, m.m2, dx, dgamma, dbeta))


class Attack:
    def __init__(self, patience):
        self.patience = patience
        self.expected = bits()
        self.forks = 0
        self.codes = []
        self.stop = False
        self.calls = 0

    def check(self):
        return SAME if bits() == self.expected else OTHER_BITS

    def wait(self, pid):
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return HANGS

    def fork(self, function):
        """Fork, and note how the child ended that returned what a function does."""
        self.forks += 1
        pid = os.fork()
        if pid == 0:
            try:
                code = function()
            except BaseException:
                code = 99
            os._exit(code)
        self.codes.append(self.wait(pid))

    # Each of these forks once in the parent, and some a second time in the child.

    def plainly(self):
        bits()
        self.fork(self.check)

    def in_a_thread(self):
        self.in_threads(lambda: (bits(), self.fork(self.check)))

    def returning_from_its_thread(self):
        """The child ends as its only thread does: with no `_exit` before that."""

        def thread():
            bits()
            self.forks += 1
            pid = os.fork()
            if pid:
                self.codes.append(self.wait(pid))
            elif self.check() != SAME:
                os._exit(OTHER_BITS)

        self.in_threads(thread)

    def with_a_grandchild(self):
        def child():
            code = self.check()
            self.codes = []
            self.fork(self.check)
            return code or (0 if self.codes == [SAME] else 5)

        self.forks += 1  # the child's own count is lost with it
        self.fork(child)

    def with_threads_in_the_child(self):
        def child():
            codes = []
            self.in_threads(*[lambda: codes.append(self.check())] * 3)
            return 0 if codes == [SAME] * 3 else 6

        self.fork(child)

    def in_threads(self, *functions):
        threads = [threading.Thread(target=f) for f in functions]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def busy(self):
        """Compute in a thread, which starts and leaves OpenMP threads of its own."""
        while not self.stop:
            if bits() != self.expected:
                self.codes.append(OTHER_BITS)
            self.calls += 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="of each call in the parent")
    parser.add_argument("--busy", type=int, default=2, help="threads that compute meanwhile")
    parser.add_argument("--patience", type=float, default=30, help="seconds until a child hangs")
    options = parser.parse_args()
    fastbn.set_num_threads(options.threads)
    attack = Attack(options.patience)
    ways = [
        attack.plainly, attack.in_a_thread, attack.returning_from_its_thread,
        attack.with_a_grandchild, attack.with_threads_in_the_child,
    ]  # fmt: skip
    threads = [threading.Thread(target=attack.busy) for _ in range(options.busy)]
    for t in threads:
        t.start()
    k = 0
    while attack.forks < options.forks:
        ways[k % len(ways)]()
        k += 1
    attack.stop = True
    for t in threads:
        t.join()
    hangs = attack.codes.count(HANGS)
    wrong = len(attack.codes) - attack.codes.count(SAME) - hangs
    print(
        f"{attack.forks} forks in {len(ways)} ways beside {attack.calls} calls: "
        f"{hangs} hangs, {wrong} wrong"
    )
    sys.exit(hangs + wrong > 0)


if __name__ == "__main__":
    main()
