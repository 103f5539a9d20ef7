import mmap
import os
import signal
import threading

from vfsmap.pmem.mutex import SIZE, Grip, Mutex


def make_mutex() -> tuple[mmap.mmap, Mutex]:
    memory = mmap.mmap(-1, 4096)
    mutex = Mutex(memoryview(memory)[:SIZE])
    mutex.create()
    return memory, mutex


def test_mutex_of_a_killed_process_is_orphaned_once_and_then_clean() -> None:
    _, mutex = make_mutex()
    child = os.fork()
    if child == 0:
        mutex.lock()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert mutex.lock() is Grip.ORPHANED
    mutex.mend()
    mutex.release()
    assert mutex.lock() is Grip.CLEAN
    mutex.release()


def test_thread_that_holds_the_mutex_is_told_so_and_does_not_wait() -> None:
    _, mutex = make_mutex()
    assert mutex.lock() is Grip.CLEAN
    assert mutex.lock() is Grip.REENTERED
    mutex.release()


def test_second_thread_waits_for_the_first() -> None:
    _, mutex = make_mutex()
    mutex.lock()
    order: list[str] = []

    def second() -> None:
        assert mutex.lock() is Grip.CLEAN
        order.append("second")
        mutex.release()

    thread = threading.Thread(target=second)
    thread.start()
    order.append("first")
    mutex.release()
    thread.join()
    assert order == ["first", "second"]


def test_processes_that_add_under_the_mutex_lose_no_addition() -> None:
    memory, mutex = make_mutex()
    counter = memoryview(memory)[SIZE : SIZE + 8].cast("Q")
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            for _ in range(2000):
                mutex.lock()
                counter[0] += 1
                mutex.release()
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert counter[0] == 8000
