// The instruction set that the kernels are chosen for, once, at run time.
#pragma once

namespace bdu::cpu {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();

} // namespace bdu::cpu
