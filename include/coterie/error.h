// The exceptions that Coterie throws where bytes from outside enter it. Every message is one line
// that names the file (where there is one), the field and the value. The library itself never
// prints, exits or aborts on input; bindings map these classes to Python exceptions, the command
// to exit code 2. Safe to throw and catch from any thread.
#pragma once

#include <stdexcept>
#include <string>

namespace coterie {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value that the caller chose and can correct: a field of a configuration, an argument.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A file whose bytes contradict its own format: truncated, overlapping, wrong magic.
class CorruptFile : public Error {
 public:
  using Error::Error;
};

// Memory, KV blocks, file descriptors or disk space ran out.
class ResourceExhausted : public Error {
 public:
  using Error::Error;
};

// A peer process did not take part in a collective operation.
class CommError : public Error {
 public:
  using Error::Error;
};

}  // namespace coterie
