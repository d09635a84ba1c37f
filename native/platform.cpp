#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <new>
#include <set>
#include <thread>
#include <utility>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__)
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#define BITLLM_X86 1
#include <immintrin.h>
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#else
#include <cfenv>
#endif

namespace bitllm {
namespace {

// First number of a file, `fallback` where there is none ("max" is none).
size_t read_number(const std::string& path, size_t fallback) {
    std::ifstream file(path);
    size_t value;
    return file >> value ? value : fallback;
}

// Value in bytes of a line "key   123 kB" of a file, or `fallback`.
size_t read_kilobytes(const char* path, const std::string& key, size_t fallback) {
    std::ifstream file(path);
    for (std::string word; file >> word;) {
        size_t value;
        if (word == key && file >> value) return value * 1024;
    }
    return fallback;
}

constexpr size_t UNLIMITED = std::numeric_limits<size_t>::max();

#if defined(__linux__)
// Directories of the process's cgroup and of its ancestors, each of which may hold a limit.
// `controller` is empty for the unified hierarchy (version 2), or the controller of a version 1
// hierarchy.
std::set<std::string> cgroup_directories(const std::string& controller) {
    const std::string root = controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
    std::set<std::string> directories{root};
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        // Each line is "id:controllers:/path".
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string names(1, ',');
        names.append(line, first + 1, second - first - 1).push_back(',');
        // Version 2 names no controllers: ",,"; version 1 lists them.
        std::string wanted(1, ',');
        wanted.append(controller).push_back(',');
        const bool ours = controller.empty() ? names == wanted : names.find(wanted) != names.npos;
        if (!ours) continue;
        for (std::string path = line.substr(second + 1); path.size() > 1 && path[0] == '/';
             path.resize(path.rfind('/')))
            directories.insert(root + path);
    }
    return directories;
}

// CPUs' worth of time the cgroups allow, rounded up; 0 = no limit.
int cpu_quota() {
    double least = 0;
    auto consider = [&least](double quota, double period) {
        if (quota > 0 && period > 0 && (least == 0 || quota / period < least))
            least = quota / period;
    };
    for (const std::string& directory : cgroup_directories("")) {
        std::ifstream file(directory + "/cpu.max");
        double quota = 0, period = 0;
        if (file >> quota >> period) consider(quota, period);
    }
    for (const std::string& directory : cgroup_directories("cpu")) {
        std::ifstream file(directory + "/cpu.cfs_quota_us");
        double quota = 0;
        if (file >> quota)
            consider(quota, double(read_number(directory + "/cpu.cfs_period_us", 0)));
    }
    return static_cast<int>(least) + (least > static_cast<int>(least));
}

// Bytes the cgroups leave; memory that holds reclaimable file pages counts as left.
size_t cgroup_memory_left() {
    size_t left = UNLIMITED;
    auto consider = [&left](const std::string& directory, const char* limit_file,
                            const char* usage_file, const char* reclaimable_key) {
        const size_t limit = read_number(directory + limit_file, UNLIMITED);
        const size_t used = read_number(directory + usage_file, 0);
        if (limit == UNLIMITED) return;
        size_t reclaimable = 0;
        std::ifstream statistics(directory + "/memory.stat");
        for (std::string key; statistics >> key;) {
            size_t value;
            if (statistics >> value && key == reclaimable_key) reclaimable = value;
        }
        const size_t held = used - std::min(used, reclaimable);
        left = std::min(left, limit - std::min(limit, held));
    };
    for (const std::string& directory : cgroup_directories(""))
        consider(directory, "/memory.max", "/memory.current", "inactive_file");
    for (const std::string& directory : cgroup_directories("memory"))
        consider(directory, "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                 "total_inactive_file");
    return left;
}

// Logical CPUs of the affinity mask; empty where it cannot be read.
std::set<int> allowed_cpus() {
    std::set<int> cpus;
    // Masks of machines with more CPUs than CPU_SETSIZE need a larger set: grow until the kernel
    // accepts it.
    for (int size = CPU_SETSIZE; size <= CPU_SETSIZE * 64; size *= 2) {
        cpu_set_t* mask = CPU_ALLOC(size);
        if (!mask) return cpus;
        const size_t bytes = CPU_ALLOC_SIZE(size);
        CPU_ZERO_S(bytes, mask);
        const bool known = sched_getaffinity(0, bytes, mask) == 0;
        for (int cpu = 0; known && cpu < size; ++cpu)
            if (CPU_ISSET_S(cpu, bytes, mask)) cpus.insert(cpu);
        CPU_FREE(mask);
        if (known) break;
    }
    return cpus;
}
#endif

int within_quota(size_t cpus) {
    int count = std::max(1, static_cast<int>(cpus));
#if defined(__linux__)
    if (const int quota = cpu_quota(); quota > 0) count = std::min(count, quota);
#endif
    return count;
}

}  // namespace

int usable_cpus() {
#if defined(__linux__)
    if (const std::set<int> cpus = allowed_cpus(); !cpus.empty()) return within_quota(cpus.size());
#endif
    return within_quota(std::thread::hardware_concurrency());
}

int fast_cores(const std::set<int>& cpus, const std::string& root) {
    // The slow cores of hybrid CPUs reach 80 % of the clock of the fast ones or less; fast ones
    // differ among themselves by 10 % at most.
    constexpr double FAST = 0.85;
    // Hardware threads of one core share its package and core number.
    std::map<std::pair<size_t, size_t>, double> speeds;
    double fastest = 0;
    for (const int cpu : cpus) {
        const std::string folder = root + "/cpu" + std::to_string(cpu);
        const size_t core = read_number(folder + "/topology/core_id", UNLIMITED);
        if (core == UNLIMITED) return 0;
        const size_t clock = read_number(folder + "/cpufreq/cpuinfo_max_freq", 1);
        const auto speed = static_cast<double>(read_number(folder + "/cpu_capacity", clock));
        speeds[{read_number(folder + "/topology/physical_package_id", 0), core}] = speed;
        fastest = std::max(fastest, speed);
    }
    return static_cast<int>(std::count_if(speeds.begin(), speeds.end(), [&](const auto& core) {
        return core.second >= FAST * fastest;
    }));
}

int physical_cores() {
#if defined(__linux__)
    if (const int cores = fast_cores(allowed_cpus()); cores > 0)
        return within_quota(static_cast<size_t>(cores));
#elif defined(__APPLE__)
    for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
        int cores = 0;
        size_t size = sizeof cores;
        if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
    }
#endif
    return usable_cpus();
}

size_t available_memory() {
#if defined(__linux__)
    const size_t free = read_kilobytes("/proc/meminfo", "MemAvailable:", UNLIMITED);
    const size_t least = std::min(free, cgroup_memory_left());
    return least == UNLIMITED ? 0 : least;
#elif defined(_WIN32)
    MEMORYSTATUSEX status{};
    status.dwLength = sizeof(status);
    return GlobalMemoryStatusEx(&status) ? static_cast<size_t>(status.ullAvailPhys) : 0;
#else
    return 0;
#endif
}

size_t resident_bytes() { return read_kilobytes("/proc/self/status", "VmRSS:", 0); }

size_t resident_file_bytes() {
    return read_kilobytes("/proc/self/status", "RssFile:", 0) +
           read_kilobytes("/proc/self/status", "RssShmem:", 0);
}

void trim_heap() noexcept {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

#if defined(_WIN32)

void* map_pages(size_t bytes, bool) {
    void* pages = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    if (!pages) throw std::bad_alloc();
    return pages;
}

void unmap_pages(void* pages, size_t) noexcept { VirtualFree(pages, 0, MEM_RELEASE); }

void forget_pages(const void*, size_t) {}

void prepare_worker_thread(int) noexcept {}

uint64_t fork_generation() noexcept { return 0; }

#else

void* map_pages(size_t bytes, [[maybe_unused]] bool huge) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;  // KV storage is sized for the worst case and mostly never touched
#endif
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // Advice only. Without `huge` small pages are asked for, or a system that always uses huge ones
    // would make 2 MiB resident for the first byte touched.
    madvise(pages, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    return pages;
}

void unmap_pages(void* pages, size_t bytes) noexcept { munmap(pages, bytes); }

void forget_pages([[maybe_unused]] const void* bytes, [[maybe_unused]] size_t count) {
#if defined(__linux__)
    // Only pages of a file come back as they were, and only if no copy of them was written to.
    const auto begin = reinterpret_cast<uintptr_t>(bytes), end = begin + count;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        // Each line is "begin-end rights offset device inode path".
        uintptr_t first = 0, last = 0, inode = 0;
        char rights[5] = {};
        if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %" SCNuPTR, &first,
                        &last, rights, &inode) != 4 ||
            begin < first || begin >= last)
            continue;
        if (end > last || rights[0] != 'r' || rights[1] != '-' || rights[3] != 's' || inode == 0)
            return;
        const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        const uintptr_t from = (begin + page - 1) / page * page, to = end / page * page;
        if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
        return;
    }
#endif
}

void prepare_worker_thread([[maybe_unused]] int worker) noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
#if defined(__linux__)
    char name[16];
    std::snprintf(name, sizeof(name), "bitllm-%d", worker);
    pthread_setname_np(pthread_self(), name);
#endif
}

uint64_t fork_generation() noexcept {
    static std::atomic<uint64_t> generation{0};
    static const int registered = pthread_atfork(
        nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
    static_cast<void>(registered);
    return generation.load(std::memory_order_relaxed);
}

#endif

#if defined(BITLLM_X86)

namespace {

struct CpuidRegisters {
    uint32_t eax, ebx, ecx, edx;
};

CpuidRegisters cpuid(uint32_t leaf, uint32_t subleaf = 0) {
    CpuidRegisters r{};
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    std::memcpy(&r, values, sizeof(r));
#else
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
    return r;
}

// Register states that the operating system saves; valid only where CPUID reports OSXSAVE.
uint64_t saved_states() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
#endif
}

constexpr bool bit(uint64_t word, int index) { return (word >> index) & 1; }

}  // namespace

CpuFeatures cpu_features() {
    CpuFeatures features;
    if (cpuid(0).eax < 7) return features;
    const CpuidRegisters basic = cpuid(1), extended = cpuid(7);
    const bool has_xgetbv = bit(basic.ecx, 27), has_avx = bit(basic.ecx, 28);
    if (!has_xgetbv || !has_avx) return features;
    constexpr uint64_t YMM_STATES = 0x06, ZMM_STATES = 0xe6;
    const uint64_t states = saved_states();
    if ((states & YMM_STATES) == YMM_STATES) {
        features.avx2 = bit(extended.ebx, 5);
        features.f16c = bit(basic.ecx, 29);
        features.avxvnni = extended.eax >= 1 && bit(cpuid(7, 1).eax, 4);
    }
    if ((states & ZMM_STATES) == ZMM_STATES) {
        features.avx512f = bit(extended.ebx, 16);
        features.avx512dq = bit(extended.ebx, 17);
        features.avx512bw = bit(extended.ebx, 30);
        features.avx512vl = bit(extended.ebx, 31);
        features.avx512vnni = bit(extended.ecx, 11);
    }
    return features;
}

std::string cpu_name() {
    constexpr uint32_t BRAND = 0x80000002;
    if (cpuid(0x80000000).eax < BRAND + 2) return "x86-64";
    char text[49] = {};
    for (uint32_t part = 0; part < 3; ++part) {
        const CpuidRegisters r = cpuid(BRAND + part);
        std::memcpy(text + 16 * part, &r, sizeof(r));
    }
    const std::string padded(text);
    const size_t first = padded.find_first_not_of(' '), last = padded.find_last_not_of(' ');
    return first == std::string::npos ? "x86-64" : padded.substr(first, last - first + 1);
}

void spin_pause() noexcept { _mm_pause(); }

// 0x1f80: all exceptions masked, round to nearest, denormals kept.
FloatControlScope::FloatControlScope() noexcept : former_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatControlScope::~FloatControlScope() { _mm_setcsr(static_cast<unsigned>(former_)); }

#elif defined(__aarch64__)

#if defined(__linux__)

CpuFeatures cpu_features() {
    // HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers do not define.
    constexpr unsigned long DOT_PRODUCT = 1ul << 20, MATRIX_MULTIPLY = 1ul << 13;
    CpuFeatures features;
    features.dotprod = getauxval(AT_HWCAP) & DOT_PRODUCT;
    features.i8mm = getauxval(AT_HWCAP2) & MATRIX_MULTIPLY;
    return features;
}

std::string cpu_name() { return "aarch64"; }

#elif defined(__APPLE__)

CpuFeatures cpu_features() {
    const auto has = [](const char* name) {
        int value = 0;
        size_t bytes = sizeof value;
        return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value != 0;
    };
    CpuFeatures features;
    features.dotprod = has("hw.optional.arm.FEAT_DotProd");
    features.i8mm = has("hw.optional.arm.FEAT_I8MM");
    return features;
}

std::string cpu_name() {
    char name[128] = {};
    size_t bytes = sizeof name - 1;
    return sysctlbyname("machdep.cpu.brand_string", name, &bytes, nullptr, 0) == 0 ? name
                                                                                   : "aarch64";
}

#else

CpuFeatures cpu_features() { return {}; }

std::string cpu_name() { return "aarch64"; }

#endif

void spin_pause() noexcept { __asm__ volatile("isb"); }

FloatControlScope::FloatControlScope() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(former_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
FloatControlScope::~FloatControlScope() { __asm__ volatile("msr fpcr, %0" : : "r"(former_)); }

#else

CpuFeatures cpu_features() { return {}; }

std::string cpu_name() { return "unknown"; }

void spin_pause() noexcept { std::this_thread::yield(); }

FloatControlScope::FloatControlScope() noexcept : former_(0) {
    former_ = static_cast<uint64_t>(std::fegetround());
    std::fesetround(FE_TONEAREST);
}
FloatControlScope::~FloatControlScope() { std::fesetround(static_cast<int>(former_)); }

#endif

}  // namespace bitllm
