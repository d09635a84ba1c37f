// The only operating-system code: CPU features and limits, memory mapping, the floating point
// control word.
//
// Figures that a system does not tell are 0 ("unknown"), never a guess.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>

namespace bitllm {

// What the CPU has *and* the operating system saves on a context switch.
struct CpuFeatures {
    bool avx2 = false;
    bool f16c = false;
    bool avxvnni = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512vnni = false;
    bool dotprod = false;
    bool i8mm = false;
};

CpuFeatures cpu_features();

// Model name as the system tells it, or the architecture's name.
std::string cpu_name();

// Physical cores this process may use: its affinity mask and the CPU quota of its cgroup are
// respected. Of cores of several kinds only the fast ones count: work is cut into equal parts, and
// all would wait for the slow ones. At least 1.
int physical_cores();

// How many fast cores some CPUs belong to, as the system describes them under `root`; 0 = it does
// not.
int fast_cores(const std::set<int>& cpus, const std::string& root = "/sys/devices/system/cpu");

// Logical CPUs this process may use, by affinity mask and quota. At least 1.
int usable_cpus();

// Bytes that can still be allocated without swapping: free and reclaimable memory of the machine,
// or what the limit of the process's cgroup leaves, whichever is less. 0 = unknown.
size_t available_memory();

// Bytes of this process in RAM, and how many of those are pages of files (mapped weights,
// libraries) that the system can drop and read again.
size_t resident_bytes();
size_t resident_file_bytes();

// Zeroed anonymous pages, aligned to pages, that take no memory before they are touched. `huge`
// asks for huge pages where the system has them; use it for memory that will be used in full.
// Throws std::bad_alloc.
void* map_pages(size_t bytes, bool huge = false);
void unmap_pages(void* pages, size_t bytes) noexcept;

// Drops from memory what lies in a mapped file, to be read again where it is used again. Does
// nothing for memory that is no read-only shared mapping of a file, or where a system does not
// tell.
void forget_pages(const void* bytes, size_t count);

// Gives memory that the heap has free back to the system, where the C library has a call for it.
void trim_heap() noexcept;

// Default floating point control word (round to nearest, no flushing of denormals, no traps) from
// construction to destruction, then the former one again. A calling program may have changed it;
// the numerics contract needs the default.
class FloatControlScope {
  public:
    FloatControlScope() noexcept;
    ~FloatControlScope();
    FloatControlScope(const FloatControlScope&) = delete;
    FloatControlScope& operator=(const FloatControlScope&) = delete;

  private:
    uint64_t former_;
};

// Called first on each worker thread: names it and leaves signals to the program's own threads.
void prepare_worker_thread(int worker) noexcept;

// How often this process is the child of a fork: whoever owns threads compares it with the value at
// their start.
uint64_t fork_generation() noexcept;

// Tells the CPU that this is a spin loop.
void spin_pause() noexcept;

}  // namespace bitllm
