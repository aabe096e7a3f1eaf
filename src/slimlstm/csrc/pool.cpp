#include "pool.h"

#include <unistd.h>

#include <condition_variable>
#include <thread>

namespace slimlstm {
namespace {

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for some microseconds, which is what members of a team that all run wait for each other. Who waits longer waits for
// a thread that may need this very processor, and gives it away.
template <class Done>
void spin_until(const Done& done) {
    constexpr int spins_before_yielding = 200;
    for (int spins = 0; !done(); ++spins) spins < spins_before_yielding ? pause() : std::this_thread::yield();
}

struct Pool {
    std::mutex users;  // held by the call that has the threads
    std::mutex mutex;
    std::condition_variable woken;
    unsigned job = 0;  // counts them; under ``mutex``, as are the next four
    int count = 0;
    void (*work)(void*, int) = nullptr;
    void* context = nullptr;
    int threads = 0;
    std::atomic<int> running{0};

    void serve(int member) {
        unsigned seen = 0;
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex);
            woken.wait(lock, [&] { return job != seen; });
            seen = job;
            if (member >= count) continue;
            auto* now = work;
            void* with = context;
            lock.unlock();
            now(with, member);
            running.fetch_sub(1, std::memory_order_release);
        }
    }
};

// A forked child has none of its parent's threads, and their mutexes in any state: it starts over with a new pool. None is
// ever destroyed, because its threads may still wait in it when the process ends.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    static std::atomic<pid_t> owner{0};
    static std::atomic_flag changing = ATOMIC_FLAG_INIT;
    if (owner.load(std::memory_order_acquire) != getpid()) {
        while (changing.test_and_set(std::memory_order_acquire)) pause();
        if (owner.load(std::memory_order_relaxed) != getpid()) {
            current.store(new Pool, std::memory_order_release);
            owner.store(getpid(), std::memory_order_release);
        }
        changing.clear(std::memory_order_release);
    }
    return *current.load(std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
    unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
    } else {
        spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
}

Crew::Crew() : lock_(pool().users, std::try_to_lock) {}

void Crew::run(int count, void (*work)(void*, int), void* context) {
    Pool& threads = pool();
    {
        std::lock_guard<std::mutex> lock(threads.mutex);
        for (; threads.threads < count - 1; ++threads.threads) {
            int member = threads.threads + 1;
            std::thread([&threads, member] { threads.serve(member); }).detach();
        }
        threads.count = count;
        threads.work = work;
        threads.context = context;
        threads.running.store(count - 1, std::memory_order_relaxed);
        ++threads.job;
    }
    threads.woken.notify_all();
    work(context, 0);
    spin_until([&] { return threads.running.load(std::memory_order_acquire) == 0; });
}

}  // namespace slimlstm
