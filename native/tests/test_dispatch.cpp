#include "../dispatch.h"
#include "../platform.h"
#include "check.h"

using namespace bitllm;

TEST(scalar_is_always_there_and_last) {
    const std::vector<const Kernels*> sets = available_kernels();
    CHECK(!sets.empty() && sets.back() == &scalar_kernels);
    CHECK(find_kernels("scalar") == &scalar_kernels);
    CHECK(&best_kernels() == sets.front());
}

TEST(each_set_is_found_by_its_name) {
    for (const Kernels* set : available_kernels())
        CHECK_WITH(find_kernels(set->name) == set, set->name);
    CHECK(find_kernels("") == nullptr);
    CHECK(find_kernels("AVX2") == nullptr);
    CHECK(find_kernels("neon-of-another-day") == nullptr);
}

#if defined(__x86_64__) || defined(_M_X64)
TEST(sets_need_all_their_features) {
    const CpuFeatures cpu = cpu_features();
    CHECK((find_kernels("avx2") != nullptr) == (cpu.avx2 && cpu.f16c));
    CHECK((find_kernels("avxvnni") != nullptr) == (cpu.avx2 && cpu.f16c && cpu.avxvnni));
    const bool runs_avx512 = cpu.avx2 && cpu.f16c && cpu.avx512f && cpu.avx512bw && cpu.avx512dq &&
                             cpu.avx512vl && cpu.avx512vnni;
    CHECK((find_kernels("avx512vnni") != nullptr) == runs_avx512);
}

#if defined(__GNUC__) && !defined(__clang__)  // clang does not know all of these names
TEST(cpu_features_are_those_the_compiler_sees) {
    __builtin_cpu_init();
    const CpuFeatures cpu = cpu_features();
    CHECK(cpu.avx2 == (__builtin_cpu_supports("avx2") != 0));
    CHECK(cpu.f16c == (__builtin_cpu_supports("f16c") != 0));
    CHECK(cpu.avxvnni == (__builtin_cpu_supports("avxvnni") != 0));
    CHECK(cpu.avx512f == (__builtin_cpu_supports("avx512f") != 0));
    CHECK(cpu.avx512bw == (__builtin_cpu_supports("avx512bw") != 0));
    CHECK(cpu.avx512dq == (__builtin_cpu_supports("avx512dq") != 0));
    CHECK(cpu.avx512vl == (__builtin_cpu_supports("avx512vl") != 0));
    CHECK(cpu.avx512vnni == (__builtin_cpu_supports("avx512vnni") != 0));
}
#endif
#endif

#if defined(BITLLM_NEON_EXTENSIONS)
TEST(sets_need_their_extensions) {
    const CpuFeatures cpu = cpu_features();
    CHECK(find_kernels("neon-base") != nullptr);
    CHECK((find_kernels("neon") != nullptr) == cpu.dotprod);
    CHECK((find_kernels("neon-i8mm") != nullptr) == (cpu.dotprod && cpu.i8mm));
}
#endif

TEST(every_kernel_of_every_set_is_there) {
    for (const Kernels* set : available_kernels()) {
        CHECK_WITH(set->rms_norm && set->quantize && set->dense_matvec && set->widen, set->name);
        CHECK_WITH(set->attention_scores && set->block_weights && set->weighted_values, set->name);
        for (const PackedKernels& packed : set->integer->packed)
            CHECK_WITH(packed.matvec && packed.unpack, set->name);
        CHECK_WITH(set->integer->codes_matmul && set->integer->screen_rows, set->name);
        CHECK_WITH(set->exp_shifted && set->gated && set->rescale && set->add, set->name);
    }
}
