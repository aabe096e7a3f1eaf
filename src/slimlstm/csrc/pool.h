// Threads that sleep between calls and spin only within them.
#pragma once

#include <atomic>
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
    // Calls for threads until there are ``wanted``, this one included, or so many nanoseconds are over: processors may have
    // other work. Where they have it all the time, most calls do without. Of a negative patience it waits as long as it
    // takes.
    Crew(int wanted, double patience);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    // How many came, this one included; one where another call has the threads.
    int size() const { return size_; }

    // work(context, member) for every member in [0, count) at once, member 0 on this thread; count is at most the size.
    void run(int count, void (*work)(void*, int), void* context);

  private:
    std::unique_lock<std::mutex> lock_;
    int size_ = 1;
};

}  // namespace slimlstm
