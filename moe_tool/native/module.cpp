// The Python side: addresses in, nothing owned. moe_tool/native/kernels.py checks shapes, dtypes
// and sizes before it calls.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>

#include "engine.h"
#include "replay.h"

namespace {

// What kernels.py packs for a weight: native alignment, 96 bytes.
struct PackedWeight {
  uint64_t planes[4], scales, zeros, values, bias;
  int32_t n_outputs, n_inputs, bits, group, kind, form, shift, offset;
};
struct PackedGate {
  int32_t activation, gated, interleaved;
  float alpha, limit;
};

template <class T>
const T* pointer(uint64_t address) {
  return reinterpret_cast<const T*>(static_cast<uintptr_t>(address));
}

// The same of kept codes, with the form in the same place.
struct PackedKept {
  uint64_t codes, scales, zeros, global_scale, unused[3], bias;
  int32_t n_outputs, n_inputs, code_kind, columns, scale_kind, form, rows, flags;
};
enum Flags : int32_t { kFloatZero = 1, kDivisor = 2, kIntegers = 4 };

const float kNumbers[4][16] = {
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f,
     -4.0f, -6.0f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};  // int4 without zeros

bool read_kept(const char* data, moe::KeptMatrix* out) {
  PackedKept k;
  std::memcpy(&k, data, sizeof k);
  const bool is_centred = k.code_kind == moe::kInt4 && !k.zeros;
  const int table = is_centred ? 3 : k.code_kind >= 0 && k.code_kind < 3 ? k.code_kind : 0;
  *out = {pointer<uint8_t>(k.codes), pointer<void>(k.scales), pointer<void>(k.zeros),
          pointer<float>(k.global_scale),
          kNumbers[table],
          k.n_outputs, k.n_inputs, k.code_kind, k.scale_kind, k.rows, k.columns,
          k.zeros && (k.flags & kFloatZero), (k.flags & kDivisor) != 0, (k.flags & kIntegers) != 0};
  const bool is_integer = k.code_kind == moe::kInt4 || k.code_kind == moe::kInt8;
  const bool is_group = k.columns == 16 || k.columns == 32 || k.columns == 64 ||
                        (k.columns > 0 && (k.columns % 128 == 0 || k.columns >= k.n_inputs));
  return k.code_kind >= 0 && k.code_kind <= moe::kInt8 && k.scale_kind >= 0 &&
         k.scale_kind <= moe::kE4m3Scale && k.rows > 0 && is_group &&
         k.n_inputs % (out->bits() == 4 ? 2 : 1) == 0 &&
         (is_integer || !k.zeros) &&
         (!(k.flags & kIntegers) || is_integer || k.code_kind == moe::kE2m1);
}

bool read_weight(const char* data, Py_ssize_t size, moe::Weight* out) {
  PackedWeight w;
  if (size != Py_ssize_t(sizeof w)) {
    PyErr_SetString(PyExc_ValueError, "a weight's description has the wrong size");
    return false;
  }
  std::memcpy(&w, data, sizeof w);
  *out = {};
  out->form = moe::Form(w.form);
  out->n_outputs = w.n_outputs, out->n_inputs = w.n_inputs;
  out->bias = pointer<float>(w.bias);
  bool sound = w.n_outputs > 0 && w.n_inputs > 0;
  if (out->form == moe::Form::kKept) {
    sound = sound && read_kept(data, &out->kept);
  } else if (out->form == moe::Form::kQuantized) {
    moe::QuantizedMatrix& q = out->quantized;
    for (int p = 0; p < 4; ++p) q.planes[p] = pointer<uint8_t>(w.planes[p]);
    q.scales = pointer<uint16_t>(w.scales);
    q.zeros = pointer<uint16_t>(w.zeros);
    q.shift = w.shift, q.offset = w.offset;
    q.n_outputs = w.n_outputs, q.n_inputs = w.n_inputs, q.bits = w.bits, q.group = w.group;
    sound = sound && w.bits >= 1 && w.bits <= 8 && w.shift >= 0 && w.shift <= 8 && w.group > 0 &&
            w.group % moe::kInputs == 0;
  } else {
    out->floats = {pointer<void>(w.values), w.n_outputs, w.n_inputs, w.kind};
    sound = sound && out->form == moe::Form::kFloats && w.kind >= 0 && w.kind <= 2;
  }
  if (!sound) PyErr_SetString(PyExc_ValueError, "a weight's description is not sound");
  return sound;
}

template <class F>
PyObject* without_gil(F&& body) {
  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    body();
  } catch (const std::exception&) {
    out_of_memory = true;
  }
  Py_END_ALLOW_THREADS;
  if (out_of_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* linear(PyObject*, PyObject* args) {
  const char* data;
  Py_ssize_t size;
  unsigned long long x, out;
  int n_tokens;
  if (!PyArg_ParseTuple(args, "y#KiK", &data, &size, &x, &n_tokens, &out)) return nullptr;
  moe::Weight weight;
  if (!read_weight(data, size, &weight)) return nullptr;
  return without_gil([&] {
    moe::linear(weight, pointer<float>(x), n_tokens, const_cast<float*>(pointer<float>(out)));
  });
}

PyObject* decode(PyObject*, PyObject* args) {
  const char* data;
  Py_ssize_t size;
  int first, last;
  unsigned long long out;
  if (!PyArg_ParseTuple(args, "y#iiK", &data, &size, &first, &last, &out)) return nullptr;
  moe::Weight weight;
  if (!read_weight(data, size, &weight)) return nullptr;
  if (weight.form != moe::Form::kKept || first < 0 || first > last || last > weight.n_outputs) {
    PyErr_SetString(PyExc_ValueError, "only rows of kept codes are decoded");
    return nullptr;
  }
  return without_gil(
      [&] { moe::decode(weight.kept, first, last, const_cast<float*>(pointer<float>(out))); });
}

PyObject* expert(PyObject*, PyObject* args) {
  const char *first_data, *gate_data, *second_data;
  Py_ssize_t first_size, gate_size, second_size;
  unsigned long long x, out;
  int n_tokens;
  if (!PyArg_ParseTuple(args, "y#y#y#KiK", &first_data, &first_size, &gate_data, &gate_size,
                        &second_data, &second_size, &x, &n_tokens, &out))
    return nullptr;
  moe::Weight first, second;
  if (!read_weight(first_data, first_size, &first)) return nullptr;
  if (!read_weight(second_data, second_size, &second)) return nullptr;
  PackedGate g;
  if (gate_size != Py_ssize_t(sizeof g)) {
    PyErr_SetString(PyExc_ValueError, "a gate's description has the wrong size");
    return nullptr;
  }
  std::memcpy(&g, gate_data, sizeof g);
  const moe::Gate gate{g.activation, g.gated, g.interleaved, g.alpha, g.limit};
  if (first.n_outputs != (gate.gated ? 2 : 1) * second.n_inputs) {
    PyErr_SetString(PyExc_ValueError, "the two matrices of an expert do not fit together");
    return nullptr;
  }
  return without_gil([&] {
    moe::expert(first, gate, second, pointer<float>(x), n_tokens,
                const_cast<float*>(pointer<float>(out)));
  });
}

// What channels.py packs: native alignment.
struct PackedChannels {
  uint64_t chunks, wanted, chosen, bias;
  int32_t n_channels, n_wanted, n_hidden, bits, group, chosen_is_gate, n_tokens, padding;
};

PyObject* channel_expert(PyObject*, PyObject* args) {
  const char *data, *gate_data;
  Py_ssize_t size, gate_size;
  unsigned long long x, out;
  if (!PyArg_ParseTuple(args, "y#y#KK", &data, &size, &gate_data, &gate_size, &x, &out))
    return nullptr;
  PackedChannels p;
  PackedGate g;
  bool sound = size == Py_ssize_t(sizeof p) && gate_size == Py_ssize_t(sizeof g);
  if (sound) {
    std::memcpy(&p, data, sizeof p);
    std::memcpy(&g, gate_data, sizeof g);
    sound = p.n_wanted >= 0 && p.n_channels >= p.n_wanted &&
            (p.wanted || p.n_wanted == p.n_channels) && p.n_hidden > 0 && (p.bits == 4 || p.bits == 8) && p.group > 0 &&
            p.group % moe::kInputs == 0 && p.n_tokens >= 0 && g.gated;
  }
  if (!sound) {
    PyErr_SetString(PyExc_ValueError, "the description of channels is not sound");
    return nullptr;
  }
  const moe::ChannelJob job{
      {pointer<uint8_t>(p.chunks), pointer<int32_t>(p.wanted), p.n_channels, p.n_wanted,
       p.n_hidden, p.bits, p.group},
      {g.activation, g.gated, g.interleaved, g.alpha, g.limit},
      p.chosen_is_gate != 0,
      pointer<float>(p.chosen),
      pointer<float>(p.bias),
      pointer<float>(x),
      p.n_tokens};
  return without_gil([&] { moe::channel_expert(job, const_cast<float*>(pointer<float>(out))); });
}

// Runs of [offset, bytes] behind `start` of a file into the same places of a buffer.
PyObject* read_runs(PyObject*, PyObject* args) {
  int file;
  long long start, n_runs;
  unsigned long long runs, out;
  if (!PyArg_ParseTuple(args, "iLKLK", &file, &start, &runs, &n_runs, &out)) return nullptr;
  long long total = 0;
  int error = 0;
  Py_BEGIN_ALLOW_THREADS;
  const int64_t* const run = pointer<int64_t>(runs);
  char* const to = const_cast<char*>(pointer<char>(out));
  for (long long r = 0; r < n_runs && !error; ++r) {
    int64_t offset = run[2 * r], left = run[2 * r + 1];
    while (left > 0) {
      const ssize_t count = pread(file, to + offset, size_t(left), off_t(start + offset));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) error = errno;
      if (count <= 0) break;
      offset += count, left -= count, total += count;
    }
  }
  Py_END_ALLOW_THREADS;
  if (error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyLong_FromLongLong(total);
}

PyObject* set_threads(PyObject*, PyObject* args) {
  int n_threads;
  if (!PyArg_ParseTuple(args, "i", &n_threads)) return nullptr;
  return without_gil([&] { moe::set_threads(n_threads); });
}

PyObject* use(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return PyBool_FromLong(moe::use_kernels(name));
}

PyObject* use_lookup(PyObject*, PyObject* args) {
  int bits, max_tokens;
  if (!PyArg_ParseTuple(args, "ii", &bits, &max_tokens)) return nullptr;
  return PyBool_FromLong(moe::use_lookup(bits, max_tokens));
}

// What kernels.py packs for the tables of codes: native alignment.
struct PackedPairTables {
  uint64_t planes;
  int32_t n_digits, digit_bits, quads_per_widening[moe::kMaxDigits], base;
};

PyObject* pair_product(PyObject*, PyObject* args) {
  unsigned long long codes, tokens, out;
  int n_outputs, n_quads, n_tokens;
  const char* data;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "KiiKiy#K", &codes, &n_outputs, &n_quads, &tokens, &n_tokens, &data,
                        &size, &out))
    return nullptr;
  PackedPairTables p;
  bool sound = size == Py_ssize_t(sizeof p);
  if (sound) {
    std::memcpy(&p, data, sizeof p);
    sound = n_outputs > 0 && n_quads > 0 && n_tokens >= 0 && p.n_digits >= 1 &&
            p.n_digits <= moe::kMaxDigits;
    for (int d = 0; sound && d < p.n_digits; ++d) sound = p.quads_per_widening[d] >= 1;
  }
  if (!sound) {
    PyErr_SetString(PyExc_ValueError, "the description of tables is not sound");
    return nullptr;
  }
  moe::PairTables tables{pointer<uint8_t>(p.planes), p.n_digits, p.digit_bits, {}, p.base};
  std::memcpy(tables.quads_per_widening, p.quads_per_widening, sizeof p.quads_per_widening);
  return without_gil([&] {
    moe::pair_product(pointer<uint8_t>(codes), n_outputs, n_quads, pointer<uint8_t>(tokens),
                      n_tokens, tables, const_cast<int32_t*>(pointer<int32_t>(out)));
  });
}

bool read_floats(unsigned long long values, int kind, int n_outputs, int n_inputs, int group,
                 moe::FloatMatrix* out) {
  *out = {pointer<void>(values), n_outputs, n_inputs, kind};
  const bool sound = kind >= 0 && kind <= 2 && n_outputs > 0 && n_inputs > 0 && group > 0 &&
                     group <= 128 && group % moe::kInputs == 0;
  if (!sound) PyErr_SetString(PyExc_ValueError, "a matrix's description is not sound");
  return sound;
}

PyObject* largest_of_groups(PyObject*, PyObject* args) {
  unsigned long long values, out;
  int kind, n_outputs, n_inputs, group;
  if (!PyArg_ParseTuple(args, "KiiiiK", &values, &kind, &n_outputs, &n_inputs, &group, &out))
    return nullptr;
  moe::FloatMatrix w;
  if (!read_floats(values, kind, n_outputs, n_inputs, group, &w)) return nullptr;
  return without_gil(
      [&] { moe::largest_of_groups(w, group, const_cast<float*>(pointer<float>(out))); });
}

PyObject* round_to_nearest(PyObject*, PyObject* args) {
  unsigned long long values, scales, to[moe::kMaxPlanes];
  int kind, n_outputs, n_inputs, bits, group;
  if (!PyArg_ParseTuple(args, "KiiiiiKKKKK", &values, &kind, &n_outputs, &n_inputs, &bits, &group,
                        &scales, to, to + 1, to + 2, to + 3))
    return nullptr;
  moe::FloatMatrix w;
  if (!read_floats(values, kind, n_outputs, n_inputs, group, &w)) return nullptr;
  if (bits < 2 || bits > 8) {
    PyErr_SetString(PyExc_ValueError, "codes have 2 to 8 bits");
    return nullptr;
  }
  uint8_t* planes[moe::kMaxPlanes];
  for (int p = 0; p < moe::kMaxPlanes; ++p) planes[p] = const_cast<uint8_t*>(pointer<uint8_t>(to[p]));
  return without_gil(
      [&] { moe::round_to_nearest(w, pointer<float>(scales), bits, group, planes); });
}

PyObject* in_use(PyObject*, PyObject*) { return PyUnicode_FromString(moe::kernels_in_use()); }

// What compiled_replay.py packs for the calls: native alignment.
struct PackedCalls {
  int64_t n_calls;
  int32_t n_layers, n_experts;
  uint64_t layer, start, keys, scores, guess_start, guesses, begins;
};

bool read_calls(const char* data, Py_ssize_t size, moe::Calls* out) {
  PackedCalls c;
  if (size != Py_ssize_t(sizeof c)) {
    PyErr_SetString(PyExc_ValueError, "the calls' description has the wrong size");
    return false;
  }
  std::memcpy(&c, data, sizeof c);
  *out = {c.n_calls,
          c.n_layers,
          c.n_experts,
          pointer<int32_t>(c.layer),
          pointer<int64_t>(c.start),
          pointer<int32_t>(c.keys),
          pointer<uint16_t>(c.scores),
          pointer<int64_t>(c.guess_start),
          pointer<int32_t>(c.guesses),
          pointer<uint8_t>(c.begins)};
  return true;
}

bool read_eviction(int eviction, const char* parameters, Py_ssize_t size, moe::Replay* out) {
  if (eviction < 0 || eviction > int(moe::EvictionCode::kS3Fifo) ||
      size != Py_ssize_t(sizeof out->parameters)) {
    PyErr_SetString(PyExc_ValueError, "the eviction policy's description is not sound");
    return false;
  }
  out->eviction = moe::EvictionCode(eviction);
  std::memcpy(out->parameters, parameters, sizeof out->parameters);
  return true;
}

uint16_t* counts_at(unsigned long long at) {
  return const_cast<uint16_t*>(pointer<uint16_t>(at));
}

PyObject* replay(PyObject*, PyObject* args) {
  const char *calls_data, *parameters;
  Py_ssize_t calls_size, parameters_size;
  int eviction, depth, per_layer;
  long long capacity;
  unsigned long long pinned, hits, prefetches, prefetch_hits;
  if (!PyArg_ParseTuple(args, "y#iy#LpiKKKK", &calls_data, &calls_size, &eviction, &parameters,
                        &parameters_size, &capacity, &per_layer, &depth, &pinned, &hits, &prefetches,
                        &prefetch_hits))
    return nullptr;
  moe::Calls calls;
  if (!read_calls(calls_data, calls_size, &calls)) return nullptr;
  moe::Replay how{};
  if (!read_eviction(eviction, parameters, parameters_size, &how)) return nullptr;
  how.capacity = capacity, how.per_layer = per_layer, how.pinned = pointer<uint8_t>(pinned), how.prefetch_depth = depth;
  return without_gil([&] {
    moe::replay(calls, how, {counts_at(hits), counts_at(prefetches), counts_at(prefetch_hits)});
  });
}

PyObject* replay_two(PyObject*, PyObject* args) {
  const char *calls_data, *parameters;
  Py_ssize_t calls_size, parameters_size;
  int eviction, per_layer;
  long long capacity, cheaper_capacity;
  unsigned long long answers, given, uses, misses, cheaper_uses, cheaper_misses;
  if (!PyArg_ParseTuple(args, "y#iy#LLpKKKKKK", &calls_data, &calls_size, &eviction, &parameters,
                        &parameters_size, &capacity, &cheaper_capacity, &per_layer, &answers, &given,
                        &uses, &misses, &cheaper_uses, &cheaper_misses))
    return nullptr;
  moe::Calls calls;
  moe::Replay how{};
  if (!read_calls(calls_data, calls_size, &calls) ||
      !read_eviction(eviction, parameters, parameters_size, &how))
    return nullptr;
  how.capacity = capacity, how.per_layer = per_layer;
  return without_gil([&] {
    moe::replay_two(calls, how,
                    {pointer<uint8_t>(answers), cheaper_capacity,
                     const_cast<uint8_t*>(pointer<uint8_t>(given))},
                    {counts_at(uses), counts_at(misses), counts_at(cheaper_uses),
                     counts_at(cheaper_misses)});
  });
}

PyObject* stack_depths(PyObject*, PyObject* args) {
  const char* data;
  Py_ssize_t size;
  unsigned long long next_use, depths;
  if (!PyArg_ParseTuple(args, "y#KK", &data, &size, &next_use, &depths)) return nullptr;
  moe::Calls calls;
  if (!read_calls(data, size, &calls)) return nullptr;
  return without_gil([&] {
    moe::stack_depths(calls, pointer<int64_t>(next_use),
                      const_cast<int32_t*>(pointer<int32_t>(depths)));
  });
}

PyMethodDef methods[] = {
    {"linear", linear, METH_VARARGS, "linear(weight, x, n_tokens, out)"},
    {"decode", decode, METH_VARARGS, "decode(weight, first, last, out)"},
    {"expert", expert, METH_VARARGS, "expert(first, gate, second, x, n_tokens, out)"},
    {"channel_expert", channel_expert, METH_VARARGS, "channel_expert(channels, gate, x, out)"},
    {"read_runs", read_runs, METH_VARARGS, "read_runs(file, start, runs, n_runs, out): bytes read"},
    {"set_threads", set_threads, METH_VARARGS, "set_threads(n)"},
    {"use", use, METH_VARARGS, "use(name): False where this processor cannot"},
    {"use_lookup", use_lookup, METH_VARARGS, "use_lookup(bits, max_tokens): False where not there"},
    {"pair_product", pair_product, METH_VARARGS,
     "pair_product(codes, n_outputs, n_quads, tokens, n_tokens, tables, out)"},
    {"largest_of_groups", largest_of_groups, METH_VARARGS,
     "largest_of_groups(values, kind, n_outputs, n_inputs, group, out)"},
    {"round_to_nearest", round_to_nearest, METH_VARARGS,
     "round_to_nearest(values, kind, n_outputs, n_inputs, bits, group, scales, planes...)"},
    {"in_use", in_use, METH_NOARGS, "in_use()"},
    {"replay", replay, METH_VARARGS,
     "replay(calls, eviction, parameters, capacity, per_layer, depth, pinned, hits, ...)"},
    {"replay_two", replay_two, METH_VARARGS,
     "replay_two(calls, eviction, parameters, capacity, cheaper_capacity, per_layer, answers, ...)"},
    {"stack_depths", stack_depths, METH_VARARGS, "stack_depths(calls, next_use, depths)"},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&definition); }
