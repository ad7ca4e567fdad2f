// Large tensors from memory that is used again and again, in huge pages. A fresh allocation of 100 MB costs more
// in page faults than most of what is done with it; a training step asks for the same sizes every time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace coterie {

// An uninitialised, contiguous CPU tensor. Its memory goes back to the pool with the last reference to it.
// Below 1 MiB it is an ordinary at::empty. Any thread.
at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Bytes that wait in the pool, at most one and a half times as many as were ever in use at once; and giving them back.
size_t pooled_bytes();
void release_pooled_memory();

}  // namespace coterie
