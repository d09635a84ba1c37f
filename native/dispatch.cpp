#include "dispatch.h"

#include "platform.h"

namespace bitllm {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool runs_avx2(const CpuFeatures& cpu) { return cpu.avx2 && cpu.f16c; }

bool runs_avxvnni(const CpuFeatures& cpu) { return runs_avx2(cpu) && cpu.avxvnni; }

bool runs_avx512vnni(const CpuFeatures& cpu) {
    return runs_avx2(cpu) && cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl &&
           cpu.avx512vnni;
}
#endif

std::vector<const Kernels*> detected_kernels() {
    std::vector<const Kernels*> sets;
#if defined(__x86_64__) || defined(_M_X64)
    const CpuFeatures cpu = cpu_features();
    if (runs_avx512vnni(cpu)) sets.push_back(&avx512vnni_kernels);
    if (runs_avxvnni(cpu)) sets.push_back(&avxvnni_kernels);
    if (runs_avx2(cpu)) sets.push_back(&avx2_kernels);
#elif defined(__aarch64__)
#if defined(BITLLM_NEON_EXTENSIONS)
    const CpuFeatures cpu = cpu_features();
    if (cpu.dotprod && cpu.i8mm) sets.push_back(&neon_i8mm_kernels);
    if (cpu.dotprod) sets.push_back(&neon_kernels);
#endif
    sets.push_back(&neon_base_kernels);
#endif
    sets.push_back(&scalar_kernels);
    return sets;
}

}  // namespace

// Once: under a hypervisor each question to the CPU takes microseconds.
const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> sets = detected_kernels();
    return sets;
}

const Kernels& best_kernels() { return *available_kernels().front(); }

const Kernels* find_kernels(std::string_view name) {
    for (const Kernels* set : available_kernels())
        if (set->name == name) return set;
    return nullptr;
}

}  // namespace bitllm
