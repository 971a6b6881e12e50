// Where our Status becomes XLA's Error; nothing below ffi/ knows the latter.
#pragma once

#include <string>

#include "call/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

inline xla::ffi::Error to_ffi(const Status& status, const char* target) {
  const std::string message = std::string(target) + ": " + status.message();
  switch (status.code()) {
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, message);
    case StatusCode::kUnimplemented:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, message);
    case StatusCode::kInternal:
      break;
  }
  return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, message);
}

}  // namespace jax_fa3

// Binds `name` to the value of a StatusOr expression, or returns its status.
#define JFA_TRY(name, expr)                       \
  auto name##_or = (expr);                        \
  if (!name##_or.ok()) return name##_or.status(); \
  const auto& name = name##_or.value()
