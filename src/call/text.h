// Joins values into the text of a message.
#pragma once

#include <sstream>
#include <string>

namespace jax_fa3 {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace jax_fa3
