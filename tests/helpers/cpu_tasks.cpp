// Stands in for the instruction sets and for torch's threads beneath the CPU operators of csrc/cpu, whose sources are
// compiled with it: kernels compute nothing and note what they are asked for. So the tasks of any number of threads can
// be counted on any machine (cpu_tasks.py).
#include <algorithm>
#include <vector>

#include "cpu/isa.h"

#define INFSA_ISA counted
#define INFSA_VEC_BYTES 16
#include "cpu/image_block.h"

namespace infsa::cpu {
namespace {

// One kernel call. Those of a loop may run at once, but for two of Pure that add to the same tokens of a head.
struct Task {
  int64_t loop, work, head, queries, keys;
};

std::vector<Task> tasks;
int64_t loops = 0;
uint32_t threads = 1;

void note(int64_t work, int64_t head = -1, int64_t queries = -1, int64_t keys = -1) {
  tasks.push_back({loops, work, head, queries, keys});
}

void note_cell(const PureHead& h, Range keys, Range queries, bool mirrored) {
  const int64_t head = reinterpret_cast<int64_t>(h.q.data);
  // Of a symmetric head's chunk with itself, the blocks on and above the diagonal.
  const int64_t work =
      h.tied && !mirrored ? queries.size() * (queries.size() + kPureBlock) / 2 : queries.size() * keys.size();
  // Without cells of keys, nothing is added to keys; where k is q they are queries too.
  const bool adds = h.tied || keys.size() < h.M;
  note(work, head, queries.begin, adds ? (h.tied ? keys.begin : -2 - keys.begin) : -1);
}

int64_t no_scratch(int64_t, int64_t, bool) { return 0; }

const Kernels counting = {
    16,
    32,
    12,
    {[](const Tokens&, const void*, int64_t, int64_t, double, Range) {},
     [](const Tokens&, int64_t, Range) { return 1.0; }, [](const void*, int64_t, Range) { return 1.0; },
     [](const Tokens&, const Tokens&, const void*, int64_t, int64_t, Range) { return 1.0; }},
    {[](LinearPass, int64_t, int64_t, int64_t) -> int64_t { return 0; },
     [](LinearPass pass, const LinearArgs& a, const LinearTask& t) {
       note((t.end - t.begin) * t.heads);
       const int64_t width = round_up(pass == LinearPass::forward_keys ? a.d_v : a.d, 16);
       if (t.sums) std::fill_n(t.sums, t.heads * (width + 1), 0.0);
     },
     [](double*, int64_t, int64_t) {}, [](const double*, int64_t) { return 1.0; },
     [](const double*, int64_t, double, double, double, void*, double, void*) {},
     [](double*, const double*, int64_t, double, double, double, void*) {}},
    {[](const PureHead&, bool) -> int64_t { return 0; },
     [](const PureHead& h, const PureSums&, Range keys, Range queries, bool mirrored, void*) {
       note_cell(h, keys, queries, mirrored);
       return 1.0;
     },
     [](const PureHead& h, const PureSums&, Range keys, Range queries, bool mirrored, void*) {
       note_cell(h, keys, queries, mirrored);
     }},
    {counted::token_block<float>, [](const Tokens&, int64_t, int64_t, Range, void*, void*) {},
     [](const Tokens&, int64_t, int64_t, Range, void*, void*) {}},
    {no_scratch,
     [](const Image&, const QueryArgs& a, Range tokens, int64_t, int64_t shares, double*, void*) {
       note(tokens.size() * a.H * a.d / shares);
     },
     [](const Image&, const QueryArgs& a, Range tokens, const Wave&, int64_t, void*) {
       note(2 * tokens.size() * a.H * a.d);
     },
     [](const Wave&, int64_t tokens, int64_t, int64_t D, Range tiles, int64_t, void*) {
       // A tile of 12 channels by a panel of 32, in units of D.
       note(tokens * tiles.size() * 12 * 32 / D);
     },
     [](const Wave&, int64_t, int64_t, Range, double*) {}},
    {no_scratch,
     [](const Image&, const ScoreArgs& a, Range tokens, const ScoreSums&, void*) { note(tokens.size() * a.H); },
     [](const Image&, const ScoreArgs& a, Range tokens, void*, double*, void*) { note(tokens.size() * a.H); }}};

}  // namespace

const char* isa_name() { return "counted"; }
const Kernels& kernels_for(Dtype) { return counting; }

}  // namespace infsa::cpu

using namespace infsa::cpu;

extern "C" {

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = threads;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                                  void* context) {
  ++loops;
  body(begin, end, context);
  ++loops;
  return AOTI_TORCH_SUCCESS;
}

INFSA_EXPORT void begin_counting(uint32_t on_threads) {
  threads = on_threads;
  tasks.clear();
}

INFSA_EXPORT int64_t task_count() { return tasks.size(); }
INFSA_EXPORT const int64_t* counted_tasks() { return &tasks.data()->loop; }
}
