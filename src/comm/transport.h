// What a backend supplies: messages between two ranks. Everything collective is built on it, once, in this folder.
//
// Messages of the same (sender, receiver, tag) arrive in the order in which they were sent; a receiver knows the length
// before. One thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string_view>

namespace coterie {

using CommClock = std::chrono::steady_clock;

// A peer is known to be lost, or the backend failed; the text is the backend's own reason.
class TransportError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A message under way; its memory stays until it is done or its transport is closed. Throws TransportError.
class Message {
 public:
  virtual ~Message() = default;
  virtual bool done() = 0;  // without blocking; moves others too. Transports without can_poll: false until waited for
  virtual bool wait(CommClock::time_point deadline) = 0;  // blocks until it is done (true) or time is up (false)
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual std::string_view name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual bool can_poll() const = 0;  // whether Message::done() finds out by itself

  // Begin a message of bytes > 0, peer != rank(), tag from 0 to 2^31 - 1. TransportError.
  virtual std::unique_ptr<Message> send(int to, int tag, const void* data, size_t bytes) = 0;
  virtual std::unique_ptr<Message> receive(int from, int tag, void* data, size_t bytes) = 0;

  // The good end, after the last message, with all ranks: MPI takes a process that ends without it for one that
  // crashed, and stops the others. The transport is of no further use.
  virtual void finish() { close(); }

  // The bad end. After it nothing reads or writes memory of messages under way; the transport is of no further use.
  virtual void close() noexcept = 0;
};

}  // namespace coterie
