// A pool of threads that sleep between calls and spin only within them.
#pragma once

#include <atomic>
#include <mutex>

namespace slimlstm {

// A reusable barrier for ``count`` threads that spins and never sleeps.
class Barrier {
  public:
    void expect(int count) { count_ = count; }
    void wait();

  private:
    int count_ = 0;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

// Exclusive lease on the pool.
class Crew {
  public:
    // Wakes threads and waits until ``wanted`` have joined, the caller included, or ``patience`` nanoseconds have passed,
    // since the processors may be busy. After repeated misses most calls do not wake threads. A negative patience waits
    // without a limit.
    Crew(int wanted, double patience);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    // The number of threads that joined, the caller included; 1 if another call holds the lease.
    int size() const { return size_; }

    // Runs work(context, member) in parallel for every member in [0, count), member 0 on this thread; count <= size().
    void run(int count, void (*work)(void*, int), void* context);

  private:
    std::unique_lock<std::mutex> lock_;
    int size_ = 1;
};

}  // namespace slimlstm
