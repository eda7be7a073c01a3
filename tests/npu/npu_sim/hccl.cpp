// HCCL of the simulated CANN: one shared file per communicator. For tests only; not Huawei software.
//
// Every rank copies its part into a slot of its own, all meet at a barrier, and every rank reads what it needs and
// reduces it itself in the order of the ranks: sums are the same on all of them and in every run. Calls return when
// the work is done. A rank that never comes ends the wait of the others after a timeout.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "simulated.h"

namespace {
using npu_sim::chip;
using npu_sim::failed;
using npu_sim::setting;

// HcclResult
enum { kBadParameter = 1, kInternalError = 4, kNotSupported = 5, kTimeout = 9 };
// HcclReduceOp
enum { kSum = 0, kProduct = 1, kMaximum = 2, kMinimum = 3 };
// HcclDataType
enum {
  kInt8,
  kInt16,
  kInt32,
  kFloat16,
  kFloat32,
  kInt64,
  kUint64,
  kUint8,
  kUint16,
  kUint32,
  kFloat64,
  kBfloat16,
  kTypes
};
const char* const kTypeNames[kTypes] = {"int8",   "int16", "int32",  "float16", "float32", "int64",
                                        "uint64", "uint8", "uint16", "uint32",  "float64", "bfloat16"};
const size_t kTypeSizes[kTypes] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};

constexpr size_t kSlotBytes = 1 << 20;  // larger messages go in pieces
constexpr uint32_t kMostRanks = 64;
constexpr size_t kRootInfoBytes = 4108;  // sizeof(HcclRootInfo)

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

// Seconds that a rank waits for the others, while a communicator is made or in every operation; 0 stands for ever.
double timeout(const char* variable) {
  const double chosen = atof(setting("NPU_SIM_HCCL_TIMEOUT", setting(variable, "120").c_str()).c_str());
  return chosen > 0 ? chosen : 1e9;
}

// What a rank is about to do; must be the same on all ranks.
struct Call {
  const char* name;
  int type, operation;
  uint32_t root;
  uint64_t count;
};

// The same in the shared file, where a pointer says nothing.
struct SharedCall {
  char name[16];
  int type, operation;
  uint32_t root;
  uint64_t count;
};

// One message under way between two ranks; its bytes are in the box of the pair.
struct Mail {
  std::atomic<uint32_t> full;
  uint32_t bytes;
};

// The beginning of the shared file. Behind it: a slot per rank, and a box per ordered pair of ranks.
struct Shared {
  std::atomic<uint32_t> attached, arrived, generation;
  int device[kMostRanks];
  SharedCall call[kMostRanks];
  Mail mail[kMostRanks * kMostRanks];
};
constexpr size_t kHeadBytes = (sizeof(Shared) + 4095) & ~size_t{4095};

struct Communicator {
  uint32_t ranks, rank;
  std::string path;
  int file = -1;
  Shared* shared = nullptr;
  size_t bytes = 0;
  double patience = 0;  // seconds
  bool broken = false;  // after a timeout the ranks no longer agree on where they are

  size_t slot_offset(uint32_t of) const { return kHeadBytes + of * kSlotBytes; }
  size_t box_offset(uint32_t from, uint32_t to) const { return slot_offset(ranks + from * ranks + to); }
  char* at(size_t offset) const { return reinterpret_cast<char*>(shared) + offset; }
  char* slot(uint32_t of) const { return at(slot_offset(of)); }
  Mail& mail(uint32_t from, uint32_t to) const { return shared->mail[from * kMostRanks + to]; }

  int gave_up(const char* doing) {
    broken = true;
    return failed(kTimeout, "HCCL timeout: rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " waited " +
                                std::to_string(static_cast<int>(patience)) + " s for the others in " + doing);
  }

  // False when the others did not come in time.
  bool wait(const std::function<bool()>& ready) {
    double begin = 0;
    for (int round = 0; !ready(); ++round) {
      if (round < 200) {
        sched_yield();
        continue;
      }
      usleep(50);
      if (begin == 0) begin = seconds();
      if (seconds() - begin > patience) return false;
    }
    return true;
  }

  bool barrier() {
    const uint32_t generation = shared->generation.load();
    if (shared->arrived.fetch_add(1) + 1 == ranks) {
      shared->arrived = 0;
      shared->generation.fetch_add(1);
      return true;
    }
    return wait([&] { return shared->generation.load() != generation; });
  }
};

// ---------------------------------------------------------------- making communicators

// Space on the disk for a part of the file; without it, writing to the mapping would end the process with SIGBUS.
int reserve(Communicator& group, size_t offset, size_t bytes) {
  if (!posix_fallocate(group.file, offset, bytes)) return 0;
  return failed(kInternalError, "HCCL: no space left for " + group.path);
}

int attach(Communicator& group) {
  group.file = open(group.path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (group.file < 0) return failed(kInternalError, "HCCL: cannot open " + group.path);
  group.bytes = group.box_offset(group.ranks, 0);
  if (ftruncate(group.file, group.bytes)) return failed(kInternalError, "HCCL: cannot write " + group.path);
  if (const int error = reserve(group, 0, group.box_offset(0, 0))) return error;
  void* begin = mmap(nullptr, group.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, group.file, 0);
  if (begin == MAP_FAILED) return failed(kInternalError, "HCCL: cannot map " + group.path);
  group.shared = static_cast<Shared*>(begin);
  return 0;
}

void detach(Communicator* group) {
  if (group->shared) munmap(group->shared, group->bytes);
  if (group->file >= 0) close(group->file);
  delete group;
}

int meet(Communicator& group) {
  Shared& shared = *group.shared;
  shared.device[group.rank] = npu_sim::physical_device();
  shared.attached.fetch_add(1);
  group.patience = timeout("HCCL_CONNECT_TIMEOUT");
  if (!group.wait([&] { return shared.attached.load() >= group.ranks; }) || !group.barrier())
    return group.gave_up("making a communicator");
  if (group.rank == 0) unlink(group.path.c_str());
  group.patience = timeout("HCCL_EXEC_TIMEOUT");
  for (uint32_t other = 0; other < group.ranks; ++other)
    if (other != group.rank && shared.device[other] == shared.device[group.rank])
      return failed(kBadParameter, "HCCL: ranks " + std::to_string(std::min(other, group.rank)) + " and " +
                                       std::to_string(std::max(other, group.rank)) + " are both on device " +
                                       std::to_string(shared.device[other]) +
                                       " (torch.npu.set_device(local_rank) missing?)");
  return 0;
}

// ---------------------------------------------------------------- what may be sent

bool known_type(int type) { return type >= 0 && type < kTypes && (type != kBfloat16 || chip().bfloat16); }

int refused_type(const char* name, int type) {
  const char* type_name = type >= 0 && type < kTypes ? kTypeNames[type] : "this type";
  return failed(kNotSupported, std::string("HCCL ") + name + " on " + chip().name + " does not take " + type_name);
}

// Reductions take fewer types than copies do, and a product fewer than a sum (as Huawei's HCCL manual says).
bool reducible(int type, int operation) {
  switch (type) {
    case kInt8:
    case kInt32:
    case kInt64:
    case kFloat16:
    case kFloat32:
      return true;
    case kInt16:
    case kBfloat16:
      return chip().bfloat16 && operation != kProduct;
  }
  return false;
}

// ---------------------------------------------------------------- collectives

template <class Value, class Wide>
Value combine(Value left, Value right, int operation) {
  const Wide x = static_cast<Wide>(left), y = static_cast<Wide>(right);
  switch (operation) {
    case kSum:
      return static_cast<Value>(x + y);
    case kProduct:
      return static_cast<Value>(x * y);
    case kMaximum:
      return static_cast<Value>(std::max(x, y));
    default:
      return static_cast<Value>(std::min(x, y));
  }
}

// On a chip that saturates, finite numbers do not make an infinity; whether the flag is raised is not known, here not.
template <class Value>
Value saturated(Value result, Value left, Value right) {
  if constexpr (std::is_same_v<Value, c10::Half> || std::is_same_v<Value, float>)
    if (chip().saturates && std::isinf(result) && !std::isinf(left) && !std::isinf(right))
      return result > Value(0) ? std::numeric_limits<Value>::max() : std::numeric_limits<Value>::lowest();
  return result;
}

template <class Value, class Wide>
void reduce_values(char* into, const char* from, size_t count, int operation) {
  auto* left = reinterpret_cast<Value*>(into);
  const auto* right = reinterpret_cast<const Value*>(from);
  for (size_t i = 0; i < count; ++i)
    left[i] = saturated(combine<Value, Wide>(left[i], right[i], operation), left[i], right[i]);
}

void reduce_into(char* into, const char* from, size_t count, int type, int operation) {
  switch (type) {
    case kInt8:
      return reduce_values<int8_t, int>(into, from, count, operation);
    case kInt16:
      return reduce_values<int16_t, int>(into, from, count, operation);
    case kInt32:
      return reduce_values<int32_t, int64_t>(into, from, count, operation);
    case kInt64:
      return reduce_values<int64_t, int64_t>(into, from, count, operation);
    case kFloat16:
      return reduce_values<c10::Half, float>(into, from, count, operation);
    case kBfloat16:
      return reduce_values<c10::BFloat16, float>(into, from, count, operation);
    case kFloat32:
      return reduce_values<float, float>(into, from, count, operation);
  }
}

// The parts of all ranks, reduced in their order.
void reduce_slots(const Communicator& group, char* into, size_t bytes, const Call& call) {
  memcpy(into, group.slot(0), bytes);
  for (uint32_t rank = 1; rank < group.ranks; ++rank)
    reduce_into(into, group.slot(rank), bytes / kTypeSizes[call.type], call.type, call.operation);
}

void announce(Communicator& group, const Call& call) {
  SharedCall& shared = group.shared->call[group.rank];
  shared = SharedCall{{}, call.type, call.operation, call.root, call.count};
  strncpy(shared.name, call.name, sizeof(shared.name) - 1);
}

std::string words(const SharedCall& call) {
  return std::string(call.name) + " of " + std::to_string(call.count) + " x " + kTypeNames[call.type];
}

// CANN's error EI0005: the ranks are not doing the same.
int compare_calls(Communicator& group) {
  const SharedCall& first = group.shared->call[0];
  for (uint32_t rank = 1; rank < group.ranks; ++rank) {
    const SharedCall& other = group.shared->call[rank];
    if (!strcmp(first.name, other.name) && first.type == other.type && first.operation == other.operation &&
        first.root == other.root && first.count == other.count)
      continue;
    group.broken = true;
    return failed(kBadParameter,
                  "EI0005: The arguments for collective communication are inconsistent between ranks: rank 0 is in " +
                      words(first) + ", rank " + std::to_string(rank) + " in " + words(other));
  }
  return 0;
}

using Piece = std::function<void(size_t offset, size_t bytes)>;

// Moves `call.count` values in pieces: put() fills this rank's slot, then, when all have done so, get() reads them.
int exchange(Communicator* group, const Call& call, const Piece& put, const Piece& get) {
  if (!known_type(call.type)) return refused_type(call.name, call.type);
  if (group->broken) return failed(kInternalError, "HCCL: this communicator failed before");
  const size_t total = call.count * kTypeSizes[call.type];
  size_t offset = 0;
  announce(*group, call);
  do {
    const size_t bytes = std::min(total - offset, kSlotBytes);
    put(offset, bytes);
    if (!group->barrier()) return group->gave_up(call.name);
    if (offset == 0)
      if (const int error = compare_calls(*group)) return error;
    get(offset, bytes);
    if (!group->barrier()) return group->gave_up(call.name);
    offset += bytes;
  } while (offset < total);
  return 0;
}

// ---------------------------------------------------------------- point to point

struct Transfer {
  bool sends;
  uint32_t peer;
  char* data;
  size_t bytes, done = 0;
  bool started = false;
  bool finished() const { return started && done == bytes; }
};

// Moves the next piece of one transfer if its box allows it. Negative: an HcclResult with the sign turned.
int advance(Communicator* group, Transfer& transfer) {
  const uint32_t from = transfer.sends ? group->rank : transfer.peer;
  const uint32_t to = transfer.sends ? transfer.peer : group->rank;
  Mail& mail = group->mail(from, to);
  const size_t box = group->box_offset(from, to), left = transfer.bytes - transfer.done;
  if (transfer.sends == (mail.full.load() != 0)) return 0;
  if (transfer.sends) {
    mail.bytes = std::min(left, kSlotBytes);
    if (reserve(*group, box, kSlotBytes)) return -kInternalError;
    memcpy(group->at(box), transfer.data + transfer.done, mail.bytes);
  } else {
    if (mail.bytes > left)
      return -failed(kBadParameter,
                     "HCCL: rank " + std::to_string(from) + " sent more than rank " + std::to_string(to) + " receives");
    memcpy(transfer.data + transfer.done, group->at(box), mail.bytes);
  }
  transfer.done += mail.bytes;
  transfer.started = true;
  mail.full = transfer.sends;
  return 1;
}

// True when an earlier transfer in the same direction with the same peer is still open: messages keep their order.
bool must_wait(const std::vector<Transfer>& transfers, size_t index) {
  for (size_t earlier = 0; earlier < index; ++earlier) {
    const Transfer& other = transfers[earlier];
    if (!other.finished() && other.sends == transfers[index].sends && other.peer == transfers[index].peer) return true;
  }
  return false;
}

int transfer_all(Communicator* group, const char* name, std::vector<Transfer> transfers) {
  if (group->broken) return failed(kInternalError, "HCCL: this communicator failed before");
  double last_progress = seconds();
  for (size_t open = transfers.size(); open;) {
    bool moved = false;
    for (size_t i = 0; i < transfers.size(); ++i) {
      if (transfers[i].finished() || must_wait(transfers, i)) continue;
      const int result = advance(group, transfers[i]);
      if (result < 0) return -result;
      moved |= result > 0;
      open -= transfers[i].finished();
    }
    if (moved) {
      last_progress = seconds();
    } else {
      usleep(50);
      if (seconds() - last_progress > group->patience) return group->gave_up(name);
    }
  }
  return 0;
}

}  // namespace

// ---------------------------------------------------------------- communicators

// Called on one rank; torch_npu hands the answer to the others. It is the name of the shared file.
CANN_API int HcclGetRootInfo(char* info) {
  std::string path = setting("TMPDIR", "/tmp") + "/npu-sim-hccl-XXXXXX";
  const int file = mkstemp(path.data());
  if (file < 0) return failed(kInternalError, "HCCL: cannot make " + path);
  close(file);
  memset(info, 0, kRootInfoBytes);
  strncpy(info, path.c_str(), kRootInfoBytes - 1);
  return 0;
}

CANN_API int HcclCommInitRootInfo(uint32_t ranks, const char* info, uint32_t rank, Communicator** communicator) {
  if (ranks > kMostRanks) return failed(kBadParameter, "HCCL: more than 64 ranks");
  auto* group = new Communicator{ranks, rank, info};
  int error = attach(*group);
  if (!error) error = meet(*group);
  if (error) {
    unlink(info);
    detach(group);
    return error;
  }
  *communicator = group;
  return 0;
}

CANN_API int HcclCommInitRootInfoConfig(uint32_t ranks, const char* info, uint32_t rank, const void*,
                                        Communicator** communicator) {
  return HcclCommInitRootInfo(ranks, info, rank, communicator);
}

CANN_API int HcclCommDestroy(Communicator* group) {
  if (group) detach(group);
  return 0;
}

CANN_API uint32_t HcclGetCommConfigCapability() { return 0; }

CANN_API int HcclGetCommName(Communicator* group, char* name) {
  snprintf(name, 128, "%s", group->path.c_str() + group->path.rfind('/') + 1);
  return 0;
}

CANN_API int HcclGetCommAsyncError(Communicator*, int* error) {
  *error = 0;
  return 0;
}

CANN_API int HcclGetRankSize(Communicator* group, uint32_t* ranks) {
  *ranks = group->ranks;
  return 0;
}

CANN_API int HcclGetRankId(Communicator* group, uint32_t* rank) {
  *rank = group->rank;
  return 0;
}

CANN_API int HcclSetConfig() { return 0; }
CANN_API int HcclGroupStart() { return 0; }
CANN_API int HcclGroupEnd() { return 0; }
CANN_API int HcclCommResume() { return 0; }

// ---------------------------------------------------------------- collective operations

CANN_API int HcclBarrier(Communicator* group, void*) {
  const auto nothing = [](size_t, size_t) {};
  return exchange(group, {"Barrier", kInt8, 0, 0, 0}, nothing, nothing);
}

CANN_API int HcclAllReduce(char* send, char* receive, uint64_t count, int type, int operation, Communicator* group,
                           void*) {
  const Call call{"AllReduce", type, operation, 0, count};
  if (!reducible(type, operation)) return refused_type(call.name, type);
  const auto put = [&](size_t offset, size_t bytes) { memcpy(group->slot(group->rank), send + offset, bytes); };
  const auto get = [&](size_t offset, size_t bytes) { reduce_slots(*group, receive + offset, bytes, call); };
  return exchange(group, call, put, get);
}

CANN_API int HcclReduce(char* send, char* receive, uint64_t count, int type, int operation, uint32_t root,
                        Communicator* group, void*) {
  const Call call{"Reduce", type, operation, root, count};
  if (!reducible(type, operation)) return refused_type(call.name, type);
  const auto put = [&](size_t offset, size_t bytes) { memcpy(group->slot(group->rank), send + offset, bytes); };
  const auto get = [&](size_t offset, size_t bytes) {
    if (group->rank == root) reduce_slots(*group, receive + offset, bytes, call);
  };
  return exchange(group, call, put, get);
}

CANN_API int HcclBroadcast(char* data, uint64_t count, int type, uint32_t root, Communicator* group, void*) {
  const auto put = [&](size_t offset, size_t bytes) {
    if (group->rank == root) memcpy(group->slot(root), data + offset, bytes);
  };
  const auto get = [&](size_t offset, size_t bytes) {
    if (group->rank != root) memcpy(data + offset, group->slot(root), bytes);
  };
  return exchange(group, {"Broadcast", type, 0, root, count}, put, get);
}

CANN_API int HcclAllGather(char* send, char* receive, uint64_t count, int type, Communicator* group, void*) {
  if (!known_type(type)) return refused_type("AllGather", type);
  const size_t part = count * kTypeSizes[type];
  const auto put = [&](size_t offset, size_t bytes) { memcpy(group->slot(group->rank), send + offset, bytes); };
  const auto get = [&](size_t offset, size_t bytes) {
    for (uint32_t rank = 0; rank < group->ranks; ++rank)
      memcpy(receive + rank * part + offset, group->slot(rank), bytes);
  };
  return exchange(group, {"AllGather", type, 0, 0, count}, put, get);
}

// One exchange per receiver, which reduces what the others have for it.
CANN_API int HcclReduceScatter(char* send, char* receive, uint64_t count, int type, int operation, Communicator* group,
                               void*) {
  if (!reducible(type, operation)) return refused_type("ReduceScatter", type);
  const size_t part = count * kTypeSizes[type];
  for (uint32_t receiver = 0; receiver < group->ranks; ++receiver) {
    const Call call{"ReduceScatter", type, operation, receiver, count};
    const auto put = [&](size_t offset, size_t bytes) {
      memcpy(group->slot(group->rank), send + receiver * part + offset, bytes);
    };
    const auto get = [&](size_t offset, size_t bytes) {
      if (group->rank == receiver) reduce_slots(*group, receive + offset, bytes, call);
    };
    if (const int error = exchange(group, call, put, get)) return error;
  }
  return 0;
}

CANN_API int HcclScatter(char* send, char* receive, uint64_t count, int type, uint32_t root, Communicator* group,
                         void*) {
  if (!known_type(type)) return refused_type("Scatter", type);
  const size_t part = count * kTypeSizes[type];
  for (uint32_t receiver = 0; receiver < group->ranks; ++receiver) {
    const auto put = [&](size_t offset, size_t bytes) {
      if (group->rank == root) memcpy(group->slot(root), send + receiver * part + offset, bytes);
    };
    const auto get = [&](size_t offset, size_t bytes) {
      if (group->rank == receiver) memcpy(receive + offset, group->slot(root), bytes);
    };
    if (const int error = exchange(group, {"Scatter", type, 0, root, count}, put, get)) return error;
  }
  return 0;
}

// ---------------------------------------------------------------- point-to-point operations

CANN_API int HcclSend(char* data, uint64_t count, int type, uint32_t to, Communicator* group, void*) {
  if (!known_type(type)) return refused_type("Send", type);
  return transfer_all(group, "Send", {{true, to, data, count * kTypeSizes[type]}});
}

CANN_API int HcclRecv(char* data, uint64_t count, int type, uint32_t from, Communicator* group, void*) {
  if (!known_type(type)) return refused_type("Recv", type);
  return transfer_all(group, "Recv", {{false, from, data, count * kTypeSizes[type]}});
}

CANN_API int HcclAlltoAllV(char* send, const uint64_t* send_counts, const uint64_t* send_offsets, int send_type,
                           char* receive, const uint64_t* receive_counts, const uint64_t* receive_offsets,
                           int receive_type, Communicator* group, void*) {
  if (!known_type(send_type)) return refused_type("AlltoAll", send_type);
  if (!known_type(receive_type)) return refused_type("AlltoAll", receive_type);
  const size_t send_size = kTypeSizes[send_type], receive_size = kTypeSizes[receive_type];
  std::vector<Transfer> transfers;
  for (uint32_t peer = 0; peer < group->ranks; ++peer) {
    char* from = send + send_offsets[peer] * send_size;
    char* to = receive + receive_offsets[peer] * receive_size;
    if (peer == group->rank) {
      memcpy(to, from, send_counts[peer] * send_size);
      continue;
    }
    if (send_counts[peer]) transfers.push_back({true, peer, from, send_counts[peer] * send_size});
    if (receive_counts[peer]) transfers.push_back({false, peer, to, receive_counts[peer] * receive_size});
  }
  return transfer_all(group, "AlltoAll", std::move(transfers));
}

CANN_API int HcclAlltoAll(char* send, uint64_t send_count, int send_type, char* receive, uint64_t receive_count,
                          int receive_type, Communicator* group, void*) {
  const std::vector<uint64_t> send_counts(group->ranks, send_count), receive_counts(group->ranks, receive_count);
  std::vector<uint64_t> send_offsets, receive_offsets;
  for (uint32_t peer = 0; peer < group->ranks; ++peer) {
    send_offsets.push_back(peer * send_count);
    receive_offsets.push_back(peer * receive_count);
  }
  return HcclAlltoAllV(send, send_counts.data(), send_offsets.data(), send_type, receive, receive_counts.data(),
                       receive_offsets.data(), receive_type, group, nullptr);
}

struct HcclSendRecvItem {
  int kind;  // 0: send, 1: receive
  char* data;
  uint64_t count;
  int type;
  uint32_t peer;
};

CANN_API int HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, Communicator* group, void*) {
  std::vector<Transfer> transfers;
  for (uint32_t i = 0; i < count; ++i) {
    const HcclSendRecvItem& item = items[i];
    if (!known_type(item.type)) return refused_type("BatchSendRecv", item.type);
    transfers.push_back({item.kind == 0, item.peer, item.data, item.count * kTypeSizes[item.type]});
  }
  return transfer_all(group, "BatchSendRecv", std::move(transfers));
}
