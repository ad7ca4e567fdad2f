// libcoterie_mpi.so: messages over MPI. Point to point rather than MPI's own collectives, so that a message that is
// missing names the rank that is, sums are the same bits as elsewhere, and operations may overlap in any way.
#include <mpi.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "comm/mpi/factory.h"
#include "comm/transport.h"

namespace coterie {
namespace {

void check(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw TransportError(std::string(call) + ": " + std::string(text, static_cast<size_t>(length)));
}

// How a wait gives way: it looks for about 20 us without, then lets others run, and sleeps when the peer is far behind.
class Patience {
 public:
  explicit Patience(bool crowded) : looks_(crowded ? kSpins : 0) {}

  void pause() {
    if (++looks_ <= kSpins) return;
    if (looks_ <= kSpins + kYields) {
      sched_yield();
      return;
    }
    const timespec nap{0, 50'000};
    nanosleep(&nap, nullptr);
  }

 private:
  static constexpr int kSpins = 200, kYields = 20'000;
  int looks_;
};

// Requests that nobody waits for any more stay MPI's: it is not called again after close().
class MpiMessage final : public Message {
 public:
  MpiMessage(const bool& closed, bool crowded) : closed_(closed), crowded_(crowded) {}

  MPI_Request* request() { return &request_; }

  bool done() override {
    if (request_ == MPI_REQUEST_NULL) return true;
    if (closed_) throw TransportError("closed");
    int flag = 0;
    check(MPI_Test(&request_, &flag, MPI_STATUS_IGNORE), "MPI_Test");
    return flag != 0;
  }

  bool wait(CommClock::time_point deadline) override {
    Patience patience(crowded_);
    while (!done()) {
      if (CommClock::now() >= deadline) return false;
      patience.pause();
    }
    return true;
  }

 private:
  const bool& closed_;  // of the transport, which outlives its messages
  bool crowded_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

class MpiTransport final : public Transport {
 public:
  MpiTransport() {
    int initialized = 0, provided = 0;
    MPI_Initialized(&initialized);
    if (initialized) {
      check(MPI_Query_thread(&provided), "MPI_Query_thread");
    } else {
      check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
    }
    owns_mpi_ = !initialized;
    if (provided < MPI_THREAD_SERIALIZED) {
      throw TransportError("thread level " + std::to_string(provided) + " is below MPI_THREAD_SERIALIZED");
    }
    check(MPI_Comm_dup(MPI_COMM_WORLD, &world_), "MPI_Comm_dup");
    check(MPI_Comm_set_errhandler(world_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(world_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(world_, &size_), "MPI_Comm_size");
    crowded_ = ranks_here() > sysconf(_SC_NPROCESSORS_ONLN);
  }

  std::string_view name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  bool can_poll() const override { return true; }

  std::unique_ptr<Message> send(int to, int tag, const void* data, size_t bytes) override {
    auto message = std::make_unique<MpiMessage>(closed_, crowded_);
    check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, to, tag, world_, message->request()), "MPI_Isend");
    return message;
  }
  std::unique_ptr<Message> receive(int from, int tag, void* data, size_t bytes) override {
    auto message = std::make_unique<MpiMessage>(closed_, crowded_);
    check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, from, tag, world_, message->request()), "MPI_Irecv");
    return message;
  }

  // MPI moves bytes inside its calls only; there are none any more.
  void close() noexcept override { closed_ = true; }

  void finish() override {
    closed_ = true;
    check(MPI_Comm_free(&world_), "MPI_Comm_free");
    if (owns_mpi_) check(MPI_Finalize(), "MPI_Finalize");
  }

 private:
  int ranks_here() const {
    MPI_Comm here;
    int ranks = 1;
    check(MPI_Comm_split_type(world_, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here), "MPI_Comm_split_type");
    check(MPI_Comm_size(here, &ranks), "MPI_Comm_size");
    check(MPI_Comm_free(&here), "MPI_Comm_free");
    return ranks;
  }

  MPI_Comm world_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
  bool owns_mpi_ = false, crowded_ = false, closed_ = false;
};

}  // namespace
}  // namespace coterie

extern "C" __attribute__((visibility("default"))) coterie::Transport* coterie_open_mpi_transport(char* error,
                                                                                                 size_t error_size) {
  try {
    return new coterie::MpiTransport();
  } catch (const std::exception& failure) {
    std::snprintf(error, error_size, "%s", failure.what());
    return nullptr;
  }
}
