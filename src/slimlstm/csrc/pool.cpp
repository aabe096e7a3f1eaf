#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <system_error>
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

// The processor that runs this thread; where the system does not tell, a number unique to the thread.
int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    static std::atomic<int> others{0};
    thread_local int own = others.fetch_add(1, std::memory_order_relaxed);
    return own;
#endif
}

// Spins for some microseconds, the usual wait while all members of a team run. After that it yields, because the thread
// it waits for may need this processor.
template <class Done>
void spin_until(const Done& done) {
    constexpr int spins_before_yielding = 200;
    for (int spins = 0; !done(); ++spins) spins < spins_before_yielding ? pause() : std::this_thread::yield();
}

struct Pool {
    std::mutex users;  // held by the call that leases the pool
    std::mutex mutex;
    std::condition_variable woken;
    uint32_t job = 0;  // number of the current job, never zero; guarded by ``mutex``
    int threads = 0;
    // Upper half: the job that threads may join; lower half: how many have joined. Zero if no job is open.
    std::atomic<uint64_t> open{0};
    std::atomic<uint32_t> begun{0};     // the job whose ``count``, ``work`` and ``context`` are set
    int misses = 0;                     // calls in a row that got too few threads; guarded by ``users``
    int pause = 0;                      // calls that will not wake threads; guarded by ``users``
    std::atomic<int> caller{0};         // the processor of the calling thread
    std::atomic<bool> anywhere{false};  // whether threads on that processor may join
    int count = 0;
    void (*work)(void*, int) = nullptr;
    void* context = nullptr;
    std::atomic<int> running{0};

    // Joins a job and returns the member's number, or 0 if the job is closed.
    int join(uint32_t wanted) {
        uint64_t seen = open.load(std::memory_order_acquire);
        do {
            if (seen >> 32 != wanted) return 0;
        } while (!open.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel));
        return static_cast<int>(static_cast<uint32_t>(seen)) + 1;
    }

    void serve() {
        uint32_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                woken.wait(lock, [&] { return job != seen; });
                seen = job;
            }
            // On the caller's processor this thread would only slow the caller down.
            if (!anywhere.load(std::memory_order_relaxed) && processor() == caller.load(std::memory_order_relaxed))
                continue;
            int member = join(seen);
            if (!member) continue;
            spin_until([&] { return begun.load(std::memory_order_acquire) == seen; });
            if (member < count) work(context, member);
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    // Starts the threads that have joined; members below ``members`` do the work first.
    void begin(int joined, int members, void (*what)(void*, int), void* with) {
        count = members, work = what, context = with;
        running.store(joined, std::memory_order_relaxed);
        begun.store(job, std::memory_order_release);
    }
};

// A forked child has none of its parent's threads, and its copy of the mutexes may be locked: it starts a new pool. Pools
// are never destroyed, because threads may still wait in them when the process ends.
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

Crew::Crew(int wanted, double patience) : lock_(pool().users, std::try_to_lock) {
    if (!lock_.owns_lock()) return;
    Pool& threads = pool();
    if (patience >= 0 && threads.pause > 0) {
        --threads.pause;
        return;
    }
    {
        std::lock_guard<std::mutex> lock(threads.mutex);
        if (++threads.job == 0) ++threads.job;
        threads.caller.store(processor(), std::memory_order_relaxed);
        threads.anywhere.store(patience < 0, std::memory_order_relaxed);
        threads.open.store(static_cast<uint64_t>(threads.job) << 32, std::memory_order_release);
        try {
            for (; threads.threads < wanted - 1; ++threads.threads) std::thread([&threads] { threads.serve(); }).detach();
        } catch (const std::system_error&) {
            wanted = threads.threads + 1;  // the system allows no more: those that exist do the work
        }
    }
    threads.woken.notify_all();
    auto now = std::chrono::steady_clock::now;
    auto joined = [](uint64_t open) { return static_cast<int>(static_cast<uint32_t>(open)); };
    auto all_came = [&] { return joined(threads.open.load(std::memory_order_acquire)) >= wanted - 1; };
    if (patience < 0) {
        spin_until(all_came);
    } else {
        // Do not yield: a thread that then ran here would have no processor of its own.
        auto end = now() + std::chrono::nanoseconds(static_cast<int64_t>(patience));
        while (!all_came() && now() < end) pause();
    }
    size_ = joined(threads.open.exchange(0, std::memory_order_acq_rel)) + 1;
    constexpr int forgiven = 8, pause_after = 64;
    threads.misses = size_ < wanted ? std::min(threads.misses + 1, forgiven) : 0;
    if (threads.misses == forgiven) threads.pause = pause_after;
}

Crew::~Crew() {
    if (size_ == 1) return;
    Pool& threads = pool();
    threads.begin(size_ - 1, 0, nullptr, nullptr);
    spin_until([&] { return threads.running.load(std::memory_order_acquire) == 0; });
}

void Crew::run(int count, void (*work)(void*, int), void* context) {
    Pool& threads = pool();
    if (size_ > 1) threads.begin(size_ - 1, count, work, context);
    size_ = 1;
    work(context, 0);
    spin_until([&] { return threads.running.load(std::memory_order_acquire) == 0; });
}

}  // namespace slimlstm
