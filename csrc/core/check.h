// Checks of the extension: a failed one throws a message put together from the checked values. csrc/bind
// turns the exceptions into Python's: std::invalid_argument into ValueError, WrongType into TypeError, and
// std::runtime_error into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dsc {

class WrongType : public std::logic_error {
  public:
    using std::logic_error::logic_error;
};

// A launch that did not come about. It does not know its op: csrc/bind adds the name.
class LaunchError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

}  // namespace dsc

// The caller passed a wrong value.
//     DSC_CHECK(k <= kMaxTopk, "moe_gate: num_topk must be <= ", kMaxTopk, ", got ", k);
#define DSC_CHECK(condition, ...) \
    if (not(condition)) throw std::invalid_argument(::dsc::concat(__VA_ARGS__))

// The caller passed something of the wrong type: not a tensor, or another dtype.
#define DSC_CHECK_TYPE(condition, ...) \
    if (not(condition)) throw ::dsc::WrongType(::dsc::concat(__VA_ARGS__))
