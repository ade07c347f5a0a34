// The machine's state: settings from the environment, contexts, memory with guard pages.
#include "machine.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace rig {
namespace {

thread_local int card_here = 0;
thread_local bool context_here = false;
thread_local int groups_here = 0;

unsigned long setting(const char* name, unsigned long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtoul(text, nullptr, 10) : otherwise;
}

std::vector<std::pair<int, int>> pairs(const char* name) {  // such as "0-1,2-3"
    std::vector<std::pair<int, int>> found;
    const char* text = std::getenv(name);
    int a, b, length;
    while (text && std::sscanf(text, "%d-%d%n", &a, &b, &length) == 2) {
        found.emplace_back(a, b);
        text += length + (text[length] == ',');
    }
    return found;
}

Machine* start() {
    auto* made = new Machine;
    made->cards.resize(setting("RIG_GPUS", 1));
    for (Card& card : made->cards) card.reaches.resize(made->cards.size());
    made->card_nbytes = setting("RIG_MEMORY_MIB", 2048) << 20;
    made->delay_microseconds = static_cast<unsigned>(setting("RIG_DELAY_US", 0));
    made->query_milliseconds = static_cast<unsigned>(setting("RIG_QUERY_MS", 0));
    made->hold_milliseconds = static_cast<unsigned>(setting("RIG_QUERY_HOLD_MS", 0));
    made->seed = static_cast<unsigned>(setting("RIG_SEED", 0));
    made->apart = pairs("RIG_APART");
    made->falsely = pairs("RIG_FALSELY");
    return made;
}

}  // namespace

Machine& machine() {
    static Machine* one = start();
    return *one;
}

void violation(const std::string& what) {
    std::fprintf(stderr, "rig: %s\n", what.c_str());
    if (const char* path = std::getenv("RIG_VIOLATIONS")) {
        if (std::FILE* file = std::fopen(path, "a")) {
            std::fprintf(file, "%s\n", what.c_str());
            std::fclose(file);
        }
    }
}

void start_cuda(const Lock&) {
    if (machine().started) return;
    const char* loading = std::getenv("CUDA_MODULE_LOADING");
    machine().eager = loading && std::strcmp(loading, "EAGER") == 0;
    machine().started = true;
}

int current_card() { return card_here; }
bool has_context() { return context_here; }
void set_card(int card) { card_here = card; }
int& group_depth() { return groups_here; }

void check_wait(const Lock&, const char* name, bool for_all_cards) {
    if (groups_here) violation(std::string(name) + " inside a group of NCCL's, which enqueues nothing before its end");
    if (for_all_cards && machine().unmet) violation(std::string(name) + " while a collective waits for other ranks");
}

void enter_context(const Lock& lock) {
    Card& card = machine().cards[card_here];
    if (!card.context) {
        card.context = true;
        card.legacy = make_stream(lock, card_here, cudaStreamDefault, 0);
    }
    context_here = true;
}

Allocation* find(const Lock&, std::uintptr_t address, bool freed) {
    auto& memory = machine().memory;
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return nullptr;
    Allocation& one = std::prev(after)->second;
    const bool inside = address < one.base + (one.nbytes ? one.nbytes : 1);
    return inside && (one.live || freed) ? &one : nullptr;
}

// Each allocation ends at a guard page, as nearly as its alignment allows. Its bytes are 0xff: NaN, or -1.
int allocate(Lock& lock, void** address, std::size_t nbytes, Kind kind) {
    Machine& all = machine();
    Card& card = all.cards[current_card()];
    *address = nullptr;
    check_wait(lock, kind == Kind::device ? "cudaMalloc" : "cudaHostAlloc", true);
    if (nbytes > all.card_nbytes || (kind == Kind::device && card.used + nbytes > all.card_nbytes)) {
        return cudaErrorMemoryAllocation;
    }
    // CUDA maps new memory for all cards that reach it, and may wait for them.
    for (int peer = 0; peer < static_cast<int>(all.cards.size()); ++peer) {
        if (card.reaches[peer]) wait_for_card(lock, peer);
    }
    const std::size_t rounded = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::size_t pages = (rounded + kPage - 1) / kPage * kPage;
    Allocation made;
    made.nbytes = nbytes;
    made.mapped = pages + 2 * kPage;
    void* mapping = mmap(nullptr, made.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return cudaErrorMemoryAllocation;
    made.mapping = reinterpret_cast<std::uintptr_t>(mapping);
    if (pages) mprotect(reinterpret_cast<void*>(made.mapping + kPage), pages, PROT_READ | PROT_WRITE);
    made.base = made.mapping + kPage + pages - rounded;
    made.card = current_card();
    made.kind = kind;
    std::memset(reinterpret_cast<void*>(made.base), 0xff, rounded);
    all.memory[made.base] = made;
    if (kind == Kind::device) card.used += nbytes;
    *address = reinterpret_cast<void*>(made.base);
    return 0;
}

int release(Lock& lock, void* address, Kind kind) {
    if (!address) return 0;
    Machine& all = machine();
    const auto base = reinterpret_cast<std::uintptr_t>(address);
    Allocation* found = find(lock, base);
    if (!found || found->base != base || found->kind != kind) return cudaErrorInvalidValue;
    check_wait(lock, kind == Kind::device ? "cudaFree" : "cudaFreeHost", true);
    // Freeing waits for the cards that may use the memory.
    for (int card = 0; card < static_cast<int>(all.cards.size()); ++card) {
        if (kind == Kind::pinned || card == found->card || all.cards[card].reaches[found->card]) {
            wait_for_card(lock, card);
        }
    }
    Allocation& gone = all.memory.at(base);
    gone.live = false;
    if (kind == Kind::device) all.cards[gone.card].used -= gone.nbytes;
    // The addresses stay taken: what still uses them stops at once, and nothing else is ever found there.
    madvise(reinterpret_cast<void*>(gone.mapping), gone.mapped, MADV_DONTNEED);
    mprotect(reinterpret_cast<void*>(gone.mapping), gone.mapped, PROT_NONE);
    return 0;
}

}  // namespace rig
