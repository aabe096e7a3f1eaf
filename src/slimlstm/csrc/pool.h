// Threads that sleep between calls and spin only within them.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

namespace slimlstm {

// Lets so many threads wait for each other, again and again, without sleeping.
class Barrier {
  public:
    void expect(int count) { count_ = count; }
    void wait();

  private:
    int count_ = 0;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

// The right to use the threads, which one call at a time can have.
class Crew {
  public:
    // Takes the threads if nobody else has them; ask ``available``.
    Crew();
    bool available() const { return lock_.owns_lock(); }

    // work(context, member) for every member in [0, count) at once, member 0 on this thread.
    void run(int count, void (*work)(void*, int), void* context);

  private:
    std::unique_lock<std::mutex> lock_;
};

}  // namespace slimlstm
