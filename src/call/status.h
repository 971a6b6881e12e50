// Status and StatusOr: how everything below ffi/ reports a failure. Nothing here throws.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace jax_fa3 {

enum class StatusCode : std::int32_t { kOk = 0, kInvalidArgument, kUnimplemented, kInternal };

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status invalid_argument(std::string message) {
  return Status(StatusCode::kInvalidArgument, std::move(message));
}
inline Status unimplemented(std::string message) {
  return Status(StatusCode::kUnimplemented, std::move(message));
}
inline Status internal_error(std::string message) {
  return Status(StatusCode::kInternal, std::move(message));
}

template <class T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}
  StatusOr(Status status) : status_(std::move(status)) {}

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  const T& value() const { return *value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace jax_fa3

#define JFA_CHECK_OK(expr)                     \
  do {                                         \
    ::jax_fa3::Status jfa_status_ = (expr);    \
    if (!jfa_status_.ok()) return jfa_status_; \
  } while (0)
