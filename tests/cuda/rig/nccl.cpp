// NCCL between the ranks of one process: a collective waits on each rank's stream until all ranks have come to it.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <set>

#include "kernels.h"
#include "machine.h"

using namespace rig;

namespace {

enum Result { kSuccess = 0, kUnhandledCudaError = 1, kInvalidArgument = 4, kInvalidUsage = 5 };
enum class What { all_reduce, reduce_scatter, all_gather, broadcast };
constexpr int kSum = 0;

struct Op {
    What kind;
    const char* send;
    char* recv;
    std::size_t count;
    int dtype, root;
    bool hangs = false;  // a link is broken: the ranks wait until they are aborted
};

struct Meeting {
    std::map<int, Op> ops;
    bool done = false;
};

struct Comm;

struct Clique {
    std::mutex mutex;
    std::condition_variable changed;
    int size = 0;
    std::vector<int> cards, turns;  // of each rank: its card, and how many collectives it has come to
    std::vector<bool> aborted;      // by rank
    std::map<int, Meeting> meetings;
    std::vector<Comm*> closing;  // destroyed or aborted, while others are not yet
    // Guarded by the machine's mutex: how many collectives have been enqueued of each rank, by how many ranks each of
    // them, and the ranks that a thread has used outside of groups.
    std::vector<int> enqueued;
    std::map<int, int> ranks_of;
    std::map<std::thread::id, std::set<int>> alone;

    explicit Clique(int size) : size(size), cards(size, -1), turns(size, 0), aborted(size, false), enqueued(size, 0) {}
};

struct Comm {
    std::shared_ptr<Clique> clique;
    int rank;
    std::shared_ptr<int> held = std::make_shared<int>();    // by collectives that are enqueued, and by graphs
    std::shared_ptr<int> graphs = std::make_shared<int>();  // by those in graphs
    std::set<What> warm = {};                               // kinds of collectives that have been enqueued eagerly
};

struct Pending {
    Comm* comm;
    cudaStream_t stream;
    Op op;
};

struct UniqueId {
    char bytes[128];
};

thread_local std::vector<Pending> pending;
std::map<std::string, std::weak_ptr<Clique>> cliques;

void compute(std::map<int, Op>& ops, int size) {
    const Op& first = ops.at(0);
    const std::size_t item = item_nbytes(first.dtype), nbytes = first.count * item;
    std::vector<const void*> sources;
    for (auto& entry : ops) sources.push_back(entry.second.send);
    std::vector<char> result(first.kind == What::broadcast ? nbytes : nbytes * size);
    if (first.kind == What::all_reduce) {
        sum(result.data(), sources, first.count, first.dtype);
    } else if (first.kind == What::reduce_scatter) {
        sum(result.data(), sources, first.count * size, first.dtype);
    } else if (first.kind == What::all_gather) {
        for (int rank = 0; rank < size; ++rank) std::memcpy(result.data() + rank * nbytes, sources[rank], nbytes);
    } else {
        std::memcpy(result.data(), sources[first.root], nbytes);
    }
    for (auto& entry : ops) {
        const bool part = first.kind == What::reduce_scatter;
        const std::size_t length = first.kind == What::all_gather ? nbytes * size : nbytes;
        std::memcpy(entry.second.recv, result.data() + (part ? entry.first * nbytes : 0), length);
    }
}

void meet(Clique& clique, int rank, const Op& op) {
    std::unique_lock<std::mutex> lock(clique.mutex);
    if (clique.aborted[rank]) return;
    lock.unlock();
    rank_comes(reinterpret_cast<std::uintptr_t>(&clique), rank, clique.size);
    lock.lock();
    const int turn = clique.turns[rank]++;
    Meeting& meeting = clique.meetings[turn];
    meeting.ops[rank] = op;
    if (static_cast<int>(meeting.ops.size()) == clique.size && !op.hangs) {
        for (const auto& entry : meeting.ops) {
            const Op& other = entry.second;
            if (other.kind != op.kind || other.count != op.count || other.dtype != op.dtype || other.root != op.root) {
                violation("ranks meet in different collectives");
            }
        }
        compute(meeting.ops, clique.size);
        meeting.done = true;
        clique.changed.notify_all();
    }
    clique.changed.wait(lock, [&] { return meeting.done || clique.aborted[rank]; });
    if (meeting.ops.erase(rank) && meeting.ops.empty()) clique.meetings.erase(turn);
}

// NCCL does not look where its buffers are.
void check_buffer(const Lock& lock, const Pending& one, const void* address, std::size_t count) {
    const auto number = reinterpret_cast<std::uintptr_t>(address);
    const std::size_t nbytes = count * item_nbytes(one.op.dtype);
    const Allocation* found = nbytes ? find(lock, number) : nullptr;
    const int card = one.comm->clique->cards[one.comm->rank];
    if (!nbytes || (found && found->kind == Kind::device && found->card == card &&
                    number + nbytes <= found->base + found->nbytes)) {
        return;
    }
    violation("a collective of card " + std::to_string(card) + " uses memory that is not in one allocation of the card");
}

// A collective that is enqueued and not recorded: some of its ranks may still lack it.
void count_rank(Clique& clique, int rank) {
    int& ranks = clique.ranks_of[clique.enqueued[rank]++];
    if (++ranks == 1) ++machine().unmet;
    if (ranks == clique.size) --machine().unmet;
}

int issue(Lock& lock, const Pending& one) {
    const auto stream = stream_of(lock, one.stream);
    Comm& comm = *one.comm;
    const auto clique = comm.clique;
    if (!stream || stream->card != clique->cards[comm.rank]) return kInvalidArgument;
    const bool all = one.op.kind == What::all_gather, part = one.op.kind == What::reduce_scatter;
    check_buffer(lock, one, one.op.send, one.op.count * (part ? clique->size : 1));
    check_buffer(lock, one, one.op.recv, one.op.count * (all ? clique->size : 1));
    std::shared_ptr<int> graphs;
    if (stream->capture) {
        if (!comm.warm.count(one.op.kind)) violation("a collective is recorded on a communicator that has not run it before");
        graphs = comm.graphs;
    } else {
        if (comm.graphs.use_count() > 1) violation("an eager collective on a communicator that is in a graph");
        comm.warm.insert(one.op.kind);
        count_rank(*clique, comm.rank);
    }
    enqueue(lock, *stream, [clique, graphs, held = comm.held, rank = comm.rank, op = one.op] {
        return meet(*clique, rank, op), 0;
    });
    return kSuccess;
}

// All of a group are enqueued before anybody else's call.
int issue(const std::vector<Pending>& all) {
    Lock lock(machine().mutex);
    int result = kSuccess;
    for (const Pending& one : all) {
        if (const int error = issue(lock, one)) result = error;
    }
    return result;
}

int collective(Comm* comm, cudaStream_t stream, const Op& op) {
    if (!comm || op.dtype < 0 || op.dtype > 9) return kInvalidArgument;
    if (group_depth()) return pending.push_back({comm, stream, op}), kSuccess;
    auto& used = comm->clique->alone[std::this_thread::get_id()];
    used.insert(comm->rank);
    if (used.size() > 1) violation("one thread calls the collectives of several ranks outside of a group");
    return issue({{comm, stream, op}});
}

// Whether RIG_NCCL, which a process may set meanwhile, asks for a failure.
bool fails(const char* how) {
    const char* text = std::getenv("RIG_NCCL");
    return text && std::strcmp(text, how) == 0;
}

Op op_of(What kind, const void* send, void* recv, std::size_t count, int dtype, int root = 0) {
    return {kind, static_cast<const char*>(send), static_cast<char*>(recv), count, dtype, root, fails("hangs")};
}

// Ranks that share a card are refused unless asked for, and then there may be two.
bool refused(const std::vector<int>& cards) {
    const char* asked = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    const int most = asked && std::strcmp(asked, "1") == 0 ? 2 : 1;
    for (const int card : cards) {
        int ranks = 0;
        for (const int other : cards) ranks += other == card && other >= 0;
        if (ranks > most) return true;
    }
    return false;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
    const char* text = std::getenv("RIG_NCCL_VERSION");
    return *version = text ? std::atoi(text) : 23003, kSuccess;
}

const char* ncclGetErrorString(int code) {
    return code == kInvalidUsage ? "invalid usage" : "an error of the tests' NCCL";
}

int ncclGetUniqueId(UniqueId* id) {
    static int made = 0;
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->bytes, sizeof id->bytes, "rig-%d", ++made);
    return kSuccess;
}

int ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, void*) {
    if (rank < 0 || rank >= size) return kInvalidArgument;
    if (size > 1 && !group_depth()) violation("a thread makes one of several ranks outside of a group");
    int card = 0;
    if (cudaGetDevice(&card) != cudaSuccess) return kInvalidArgument;
    auto clique = cliques[id.bytes].lock();
    if (!clique) {
        clique = std::make_shared<Clique>(size);
        cliques[id.bytes] = clique;
    }
    clique->cards[rank] = card;
    *comm = new Comm{clique, rank};
    return refused(clique->cards) ? kInvalidUsage : kSuccess;
}

int ncclCommInitAll(Comm** comms, int size, const int* cards) {
    auto clique = std::make_shared<Clique>(size);
    clique->cards.assign(cards, cards + size);
    if (refused(clique->cards)) return kInvalidUsage;
    for (int rank = 0; rank < size; ++rank) comms[rank] = new Comm{clique, rank};
    return kSuccess;
}

// The call for a process's last rank waits for the collectives of all that are enqueued, and for graphs that hold some.
int ncclCommDestroy(Comm* comm) {
    const auto clique = comm->clique;
    std::vector<Comm*> all;
    {
        std::lock_guard<std::mutex> lock(clique->mutex);
        clique->closing.push_back(comm);
        if (static_cast<int>(clique->closing.size()) == clique->size) all.swap(clique->closing);
    }
    for (Comm* one : all) {
        while (one->held.use_count() > 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        delete one;
    }
    return kSuccess;
}

// Lets go of the rank if it waits; graphs that hold collectives are waited for all the same.
int ncclCommAbort(Comm* comm) {
    {
        Lock lock(machine().mutex);
        for (auto& entry : comm->clique->ranks_of) {
            machine().unmet -= entry.second < comm->clique->size;
            entry.second = comm->clique->size;
        }
    }
    group_ends(reinterpret_cast<std::uintptr_t>(comm->clique.get()));
    {
        std::lock_guard<std::mutex> lock(comm->clique->mutex);
        comm->clique->aborted[comm->rank] = true;
        comm->clique->changed.notify_all();
    }
    return ncclCommDestroy(comm);
}

int ncclCommGetAsyncError(Comm*, int* error) {
    const char* text = std::getenv("RIG_NCCL_ERROR");
    return *error = text ? std::atoi(text) : kSuccess, kSuccess;
}

int ncclCommCount(Comm* comm, int* size) { return *size = comm->clique->size, kSuccess; }
int ncclCommCuDevice(Comm* comm, int* card) { return *card = comm->clique->cards[comm->rank], kSuccess; }
int ncclCommUserRank(Comm* comm, int* rank) { return *rank = comm->rank, kSuccess; }
int ncclCommSplit(Comm*, int, int, Comm**, void*) { return kInvalidUsage; }
int ncclSend(const void*, std::size_t, int, int, Comm*, cudaStream_t) { return kInvalidUsage; }
int ncclRecv(void*, std::size_t, int, int, Comm*, cudaStream_t) { return kInvalidUsage; }
int ncclReduce(const void*, void*, std::size_t, int, int, int, Comm*, cudaStream_t) { return kInvalidUsage; }

int ncclGroupStart() { return ++group_depth(), kSuccess; }

int ncclGroupEnd() {
    if (!group_depth()) return kInvalidUsage;
    if (--group_depth()) return kSuccess;
    std::vector<Pending> all;
    all.swap(pending);
    const bool refuses = fails("refuses") && !all.empty();
    if (refuses) all.pop_back();  // CUDA refuses a launch, and the other ranks have launched theirs
    const int result = issue(all);
    return refuses ? static_cast<int>(kUnhandledCudaError) : result;
}

int ncclAllReduce(const void* send, void* recv, std::size_t count, int dtype, int op, Comm* comm, cudaStream_t stream) {
    if (op != kSum) return kInvalidUsage;
    return collective(comm, stream, op_of(What::all_reduce, send, recv, count, dtype));
}

int ncclReduceScatter(const void* send, void* recv, std::size_t count, int dtype, int op, Comm* comm, cudaStream_t stream) {
    if (op != kSum) return kInvalidUsage;
    return collective(comm, stream, op_of(What::reduce_scatter, send, recv, count, dtype));
}

int ncclAllGather(const void* send, void* recv, std::size_t count, int dtype, Comm* comm, cudaStream_t stream) {
    return collective(comm, stream, op_of(What::all_gather, send, recv, count, dtype));
}

int ncclBroadcast(const void* send, void* recv, std::size_t count, int dtype, int root, Comm* comm, cudaStream_t stream) {
    return collective(comm, stream, op_of(What::broadcast, send, recv, count, dtype, root));
}

int ncclBcast(void* buffer, std::size_t count, int dtype, int root, Comm* comm, cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, dtype, root, comm, stream);
}

}  // extern "C"
