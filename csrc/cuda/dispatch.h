// From the switches of a launch to the instantiation that has them built in.
#pragma once

#include <type_traits>

#include "launch.h"

namespace bdu::cuda {

// Calls f(integral_constant<Stored, ...>).
template <class F>
void with_stored(Stored stored, const F& f) {
  switch (stored) {
    case Stored::float32: return f(std::integral_constant<Stored, Stored::float32>{});
    case Stored::bfloat16: return f(std::integral_constant<Stored, Stored::bfloat16>{});
    case Stored::float16: return f(std::integral_constant<Stored, Stored::float16>{});
    default: return f(std::integral_constant<Stored, Stored::mixed>{});
  }
}

// Calls f(integral_constant<Pull, ...>).
template <class F>
void with_pull(Pull pull, const F& f) {
  switch (pull) {
    case Pull::gradient: return f(std::integral_constant<Pull, Pull::gradient>{});
    case Pull::proximal: return f(std::integral_constant<Pull, Pull::proximal>{});
    default: return f(std::integral_constant<Pull, Pull::none>{});
  }
}

// Calls f(true_type or false_type).
template <class F>
void with_switch(bool on, const F& f) {
  on ? f(std::true_type{}) : f(std::false_type{});
}

} // namespace bdu::cuda
