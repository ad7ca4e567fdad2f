// Where parallel work runs. ops in kernels/ and moe/ take a ThreadPool& and cut their work into
// independent tasks; the result never depends on the number of threads or on who runs which task.
//
// NativeThreadPool owns its threads (serving). train/ supplies one that borrows torch's threads, so
// that two pools never spin against each other for the same cores.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace coterie {

class ThreadPool {
 public:
  virtual ~ThreadPool() = default;

  virtual int num_threads() const = 0;

  // Calls task(index, thread) once for every index in [0, num_tasks), thread in [0, num_threads()),
  // and returns when all are done. Every thread begins with its share of consecutive indices. Tasks don't
  // throw. Not reentrant: a task doesn't call run, and one caller at a time.
  virtual void run(int64_t num_tasks, const std::function<void(int64_t index, int thread)>& task) = 0;
};

class NativeThreadPool : public ThreadPool {
 public:
  explicit NativeThreadPool(int num_threads);  // the caller is one of them; InvalidArgument below 1
  ~NativeThreadPool() override;

  int num_threads() const override;
  void run(int64_t num_tasks, const std::function<void(int64_t index, int thread)>& task) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace coterie
