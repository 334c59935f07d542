// Threads to work on. Of those that a model's owner asks for, one alone starts nothing, so a process may fork at will.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace fastkd::runtime {

// How work is spread: over a model's own threads, or over those of a host.
class Threads {
 public:
  virtual ~Threads() = default;
  virtual int threads() const = 0;
  virtual void run(int64_t count, const std::function<void(int64_t)>& f) = 0;  // f(0) ... f(count - 1)
};

class Team;

class Workers final : public Threads {
 public:
  explicit Workers(int threads);
  Workers(const Workers&) = delete;
  ~Workers() override;

  int threads() const override { return threads_; }

  // This thread works too. The first exception is thrown here. One caller at a time has the threads; another works
  // alone meanwhile.
  void run(int64_t count, const std::function<void(int64_t)>& f) override;

 private:
  const int threads_;
  std::mutex busy_;
  std::unique_ptr<Team> team_;
  int owner_ = 0;  // the process that made the team: its threads do not follow a fork
};

}  // namespace fastkd::runtime
