// Threads that a model's owner asked for. With one thread nothing is ever started, so a process may fork at will.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace fastkd::runtime {

class Team;

class Workers {
 public:
  explicit Workers(int threads);
  Workers(const Workers&) = delete;
  ~Workers();

  int threads() const { return threads_; }

  // f(0) ... f(count - 1), spread over the threads, this one among them. The first exception is thrown here. One caller
  // at a time has the threads; another works alone meanwhile.
  void run(int64_t count, const std::function<void(int64_t)>& f);

 private:
  const int threads_;
  std::mutex busy_;
  std::unique_ptr<Team> team_;
  int owner_ = 0;  // the process that made the team: its threads do not follow a fork
};

}  // namespace fastkd::runtime
