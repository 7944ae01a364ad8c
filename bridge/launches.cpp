#include "launches.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "arguments.h"
#include "cuda_driver.h"

namespace heedful {
namespace {

constexpr int64_t MAX_DIMS = 5, MAX_PARAMETERS = 256, MAX_MAPS = 8, MAX_TENSORS = 32, MAX_FORMS = 8, ALIGNMENT = 16;
/* In the place of a parameter's size: a pointer, and an int32 and an int64 that follow from the call's length. */
constexpr int64_t POINTER = 0, FROM_LENGTH = sizeof(TensorMap) + 1, LONG_FROM_LENGTH = FROM_LENGTH + 1;
/* The dimension of that length. */
constexpr int64_t LENGTH_DIM = 2;
/* Memory that any call may write and none reads, for results that a caller does not want. Two empty tensors were half
 * of the time before a launch. It is never given back: a captured graph writes there for as long as it likes. */
constexpr int64_t UNREAD_BYTES = 1 << 20;

/* What a call is made for, beside its form. */
struct Call {
    uint64_t addresses[MAX_TENSORS];
    int64_t length = -1;
    void *stream = nullptr;
};

/* Reads the numbers of a code one after another. */
class Reader {
  public:
    explicit Reader(const heedful_tensor &code)
        : at_(static_cast<const int64_t *>(code.data)), end_(at_ + code.size[0]) {}

    int64_t next() {
        if (at_ == end_) fail("code ends too early");
        return *at_++;
    }
    int64_t below(int64_t limit) {
        const int64_t number = next();
        if (number < 0 || number >= limit) fail("code has a number out of range");
        return number;
    }

  private:
    const int64_t *at_, *end_;
};

/* A tensor that a form takes or makes. */
struct Shape {
    int32_t dtype;
    /* Whether it must begin at a multiple of ALIGNMENT, and whether LENGTH_DIM may be of any length. */
    bool aligned, free;
    /* A stride is rate times the call's length longer. */
    int64_t dims, size[MAX_DIMS], stride[MAX_DIMS], rate[MAX_DIMS];

    explicit Shape(Reader &code) {
        dtype = torch_dtype(static_cast<heedful_dtype>(code.next()));
        aligned = code.below(2) != 0;
        free = code.below(2) != 0;
        dims = code.below(MAX_DIMS + 1);
        for (int64_t dim = 0; dim < dims; ++dim) size[dim] = code.next();
        for (int64_t dim = 0; dim < dims; ++dim) stride[dim] = code.next();
        for (int64_t dim = 0; dim < dims; ++dim) rate[dim] = code.next();
    }

    bool fits(AtenTensorHandle tensor, int32_t device_type, int32_t device, uint64_t &address, int64_t &length) const {
        int32_t its_dtype = 0, its_type = 0, its_device = 0;
        int64_t its_dims = 0, *sizes = nullptr, *strides = nullptr;
        const void *data = nullptr;
        if (aoti_torch_get_dtype(tensor, &its_dtype) != 0 || its_dtype != dtype ||
            aoti_torch_get_device_type(tensor, &its_type) != 0 || its_type != device_type ||
            aoti_torch_get_device_index(tensor, &its_device) != 0 || std::max(its_device, 0) != device ||
            aoti_torch_get_dim(tensor, &its_dims) != 0 || its_dims != dims ||
            aoti_torch_get_sizes(tensor, &sizes) != 0 || !same_sizes(sizes, length) ||
            aoti_torch_get_strides(tensor, &strides) != 0 || !same_strides(strides, length) ||
            torch_get_const_data_ptr(tensor, &data) != 0)
            return false;
        address = reinterpret_cast<uint64_t>(data);
        return !aligned || address % ALIGNMENT == 0;
    }

  private:
    bool same_sizes(const int64_t *sizes, int64_t &length) const {
        for (int64_t dim = 0; dim < dims; ++dim) {
            if (free && dim == LENGTH_DIM) {
                if (length >= 0 && sizes[dim] != length) return false;
                length = sizes[dim];
            } else if (sizes[dim] != size[dim]) {
                return false;
            }
        }
        return true;
    }

    bool same_strides(const int64_t *strides, int64_t length) const {
        for (int64_t dim = 0; dim < dims; ++dim)
            if (strides[dim] != stride[dim] + rate[dim] * length) return false;
        return true;
    }
};

struct Kernel {
    void *function;
    unsigned grid[3], block, shared;
    /* It may begin while the launch before it ends, and waits inside. */
    bool dependent;
    /* Each parameter's bytes, those of a pointer or a map being written in every call. */
    std::vector<uint64_t> values;
    struct Pointer {
        size_t parameter, tensor;
    };
    std::vector<Pointer> pointers;
    struct FromLength {
        size_t parameter;
        int64_t rate, constant;
    };
    std::vector<FromLength> lengths;
    struct Mapped {
        size_t parameter, tensor;
        /* Whether its axis LENGTH_DIM is the call's length. */
        bool grows;
        int32_t data_type, swizzle, fill;
        uint32_t rank, box[MAX_DIMS];
        /* From the innermost axis on; strides in bytes, and a rate times the call's length longer. */
        uint64_t sizes[MAX_DIMS], strides[MAX_DIMS], rates[MAX_DIMS];
        TensorMap map;

        void encode(TensorMap &made, uint64_t address, int64_t length, int32_t device) const {
            constexpr int32_t no_interleave = 0, promote_to_128_bytes = 2;
            constexpr uint32_t ones[MAX_DIMS] = {1, 1, 1, 1, 1};
            uint64_t its_sizes[MAX_DIMS], its_strides[MAX_DIMS];
            std::copy_n(sizes, MAX_DIMS, its_sizes);
            std::copy_n(strides, MAX_DIMS, its_strides);
            if (grows) {
                its_sizes[rank - 1 - LENGTH_DIM] = static_cast<uint64_t>(length);
                for (uint32_t dim = 0; dim + 1 < rank; ++dim)
                    its_strides[dim] += rates[dim] * static_cast<uint64_t>(length);
            }
            const auto call = [&] {
                return cuda_driver().encode_tiled(&made, data_type, rank, reinterpret_cast<void *>(address), its_sizes,
                                                  its_strides, box, ones, no_interleave, swizzle, promote_to_128_bytes,
                                                  fill);
            };
            check_cuda(in_context(device, call), "cuTensorMapEncodeTiled");
        }
    };
    std::vector<Mapped> maps;
    /* Whether the driver's kernel has these parameters and no others. */
    bool agrees = true;

    Kernel(Reader &code, int64_t tensors, int32_t device) {
        function = reinterpret_cast<void *>(code.next());
        for (unsigned &size : grid) size = static_cast<unsigned>(code.next());
        block = static_cast<unsigned>(code.next());
        shared = static_cast<unsigned>(code.next());
        dependent = code.below(2) != 0;
        const size_t count = static_cast<size_t>(code.below(MAX_PARAMETERS));
        for (size_t index = 0; index < count; ++index) {
            size_t size = static_cast<size_t>(code.below(LONG_FROM_LENGTH + 1));
            values.push_back(0);
            if (size == POINTER) {
                pointers.push_back({index, static_cast<size_t>(code.below(tensors))});
                size = sizeof(void *);
            } else if (size == FROM_LENGTH || size == LONG_FROM_LENGTH) {
                const int64_t rate = code.next();
                lengths.push_back({index, rate, code.next()});
                size = size == FROM_LENGTH ? sizeof(int32_t) : sizeof(int64_t);
            } else if (size == sizeof(TensorMap)) {
                add_map(code, index, tensors, device);
            } else {
                values.back() = static_cast<uint64_t>(code.next());
            }
            check(index, size, true);
        }
        check(count, 0, false);
        if (maps.size() > MAX_MAPS) fail("code has too many maps");
    }

    void run(const Call &call, int32_t device) const {
        const CudaDriver &driver = cuda_driver();
        uint64_t bytes[MAX_PARAMETERS];
        void *parameters[MAX_PARAMETERS];
        TensorMap copies[MAX_MAPS];
        std::copy(values.begin(), values.end(), bytes);
        for (size_t index = 0; index < values.size(); ++index) parameters[index] = &bytes[index];
        for (const Pointer &pointer : pointers) bytes[pointer.parameter] = call.addresses[pointer.tensor];
        for (const FromLength &from : lengths)
            bytes[from.parameter] = static_cast<uint64_t>(from.constant + from.rate * call.length);
        for (size_t index = 0; index < maps.size(); ++index) {
            const Mapped &mapped = maps[index];
            const uint64_t address = call.addresses[mapped.tensor];
            if (mapped.grows) {
                mapped.encode(copies[index], address, call.length, device);
            } else {
                copies[index] = mapped.map;
                const auto replace = [&] {
                    return driver.replace_address(&copies[index], reinterpret_cast<void *>(address));
                };
                check_cuda(in_context(device, replace), "cuTensorMapReplaceAddress");
            }
            parameters[mapped.parameter] = &copies[index];
        }
        LaunchAttribute attribute = {PROGRAMMATIC_STREAM_SERIALIZATION, 0, {}};
        attribute.value.number = 1;
        const LaunchConfig config = {{grid[0], grid[1], grid[2]}, {block, 1, 1}, shared, call.stream, &attribute,
                                     dependent ? 1u : 0u};
        const auto launch = [&] { return driver.launch_kernel(&config, function, parameters, nullptr); };
        check_cuda(in_context(device, launch), "cuLaunchKernelEx");
    }

  private:
    /* What a call of the driver returns; a thread that has called nothing of CUDA's runtime yet has no context. */
    template <typename DriverCall> static CudaResult in_context(int32_t device, const DriverCall &call) {
        const CudaResult result = call();
        if (result != CUDA_INVALID_CONTEXT) return result;
        void *context = nullptr;
        check_cuda(cuda_driver().retain_context(&context, device), "cuDevicePrimaryCtxRetain");
        check_cuda(cuda_driver().set_context(context), "cuCtxSetCurrent");
        return call();
    }

    void check(size_t index, size_t expected, bool there) {
        size_t offset = 0, size = 0;
        const bool found = cuda_driver().parameter_info(function, index, &offset, &size) == 0;
        agrees = agrees && found == there && (!there || size == expected);
    }

    /* Data type, swizzle and fill as the driver numbers them. */
    void add_map(Reader &code, size_t parameter, int64_t tensors, int32_t device) {
        Mapped mapped = {};
        mapped.parameter = parameter;
        mapped.tensor = static_cast<size_t>(code.below(tensors));
        mapped.grows = code.below(2) != 0;
        mapped.data_type = static_cast<int32_t>(code.next());
        mapped.swizzle = static_cast<int32_t>(code.next());
        mapped.fill = static_cast<int32_t>(code.next());
        mapped.rank = static_cast<uint32_t>(code.below(MAX_DIMS + 1));
        if (mapped.grows && mapped.rank <= LENGTH_DIM) fail("code has a map without a length");
        for (uint32_t dim = 0; dim < mapped.rank; ++dim) mapped.box[dim] = static_cast<uint32_t>(code.next());
        for (uint32_t dim = 0; dim < mapped.rank; ++dim) mapped.sizes[dim] = static_cast<uint64_t>(code.next());
        for (uint32_t dim = 0; dim + 1 < mapped.rank; ++dim) mapped.strides[dim] = static_cast<uint64_t>(code.next());
        for (uint32_t dim = 0; dim + 1 < mapped.rank; ++dim) mapped.rates[dim] = static_cast<uint64_t>(code.next());
        /* The address of a call takes the place of this one. */
        if (!mapped.grows) mapped.encode(mapped.map, ALIGNMENT * 16, 0, device);
        maps.push_back(mapped);
    }
};

/* Where results that nobody reads go on a device. */
uint64_t unread(int32_t device_type, int32_t device) {
    static std::mutex mutex;
    static std::map<std::pair<int32_t, int32_t>, uint64_t> addresses;
    const std::lock_guard<std::mutex> held(mutex);
    uint64_t &address = addresses[{device_type, device}];
    if (address == 0) {
        const int64_t size = UNREAD_BYTES, stride = 1;
        AtenTensorHandle kept = nullptr;
        void *data = nullptr;
        if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_bool(), device_type, device, &kept) != 0 ||
            torch_get_mutable_data_ptr(kept, &data) != 0)
            fail("heedful: torch could not allocate memory");
        address = reinterpret_cast<uint64_t>(data);
    }
    return address;
}

/* What to do for tensors of one form. */
class Form {
  public:
    explicit Form(Reader code) {
        device_type_ = code.below(2) != 0 ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
        device_ = static_cast<int32_t>(code.next());
        least_ = code.next();
        most_ = code.next();
        const int64_t inputs = code.below(MAX_TENSORS), buffers = code.below(MAX_TENSORS - inputs);
        results_ = static_cast<size_t>(code.below(buffers + 1));
        const int64_t unwanted = code.below(buffers + 1);
        const int64_t kernels = code.below(MAX_PARAMETERS);
        for (int64_t index = 0; index < inputs; ++index) inputs_.emplace_back(code);
        for (int64_t index = 0; index < buffers; ++index) buffers_.emplace_back(code);
        for (int64_t index = 0; index < kernels; ++index) {
            kernels_.emplace_back(code, inputs + buffers, device_);
            agrees_ = agrees_ && kernels_.back().agrees;
        }
        for (int64_t index = buffers - unwanted; index < buffers; ++index) {
            const Shape &shape = buffers_[static_cast<size_t>(index)];
            int64_t bytes = sizeof(double);
            for (int64_t dim = 0; dim < shape.dims; ++dim) bytes *= shape.size[dim];
            if (bytes > UNREAD_BYTES) return;
        }
        allocated_ = static_cast<size_t>(buffers - unwanted);
        if (unwanted > 0) unread_ = unread(device_type_, device_);
    }

    bool agrees() const { return agrees_; }
    int32_t device() const { return device_; }

    bool fits(const Tensor *tensors, size_t count, Call &call) const {
        if (count != inputs_.size()) return false;
        call.length = -1;
        for (size_t index = 0; index < count; ++index)
            if (!inputs_[index].fits(tensors[index].get(), device_type_, device_, call.addresses[index], call.length))
                return false;
        return call.length < 0 || (call.length >= least_ && call.length <= most_);
    }

    /* Its results; seconds is what launching alone took, of `times` turns. */
    std::vector<Tensor> run(Call &call, int64_t times = 0, double *seconds = nullptr) const {
        std::vector<Tensor> made;
        const size_t buffers = std::min(allocated_, buffers_.size());
        made.reserve(buffers);
        for (size_t index = 0; index < buffers; ++index) {
            const Shape &shape = buffers_[index];
            AtenTensorHandle handle = nullptr;
            if (aoti_torch_empty_strided(shape.dims, shape.size, shape.stride, shape.dtype, device_type_, device_,
                                         &handle) != 0)
                fail("heedful: torch could not allocate an output");
            made.emplace_back(reinterpret_cast<StableIValue>(handle));
            void *data = nullptr;
            if (torch_get_mutable_data_ptr(handle, &data) != 0) fail("heedful: torch could not give an output's data");
            call.addresses[inputs_.size() + index] = reinterpret_cast<uint64_t>(data);
        }
        for (size_t index = buffers; index < buffers_.size(); ++index) call.addresses[inputs_.size() + index] = unread_;
        const auto launch = [&] {
            for (const Kernel &kernel : kernels_) kernel.run(call, device_);
        };
        launch();
        if (seconds != nullptr) {
            const auto begin = std::chrono::steady_clock::now();
            for (int64_t turn = 0; turn < times; ++turn) launch();
            *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        }
        made.erase(made.begin() + static_cast<std::ptrdiff_t>(results_), made.end());
        return made;
    }

  private:
    int32_t device_type_, device_;
    int64_t least_, most_;
    size_t results_;
    /* Buffers behind so many are unread. */
    size_t allocated_ = MAX_TENSORS;
    uint64_t unread_ = 0;
    std::vector<Shape> inputs_, buffers_;
    std::vector<Kernel> kernels_;
    bool agrees_ = true;
};

/* Forms by the place that they were given, the latest few of each. */
class Places {
  public:
    int64_t keep(std::shared_ptr<const Form> form, int64_t place) {
        const std::unique_lock<std::shared_mutex> held(mutex_);
        if (place == 0) place = ++last_;
        std::vector<std::shared_ptr<const Form>> &forms = forms_[place];
        if (forms.size() == MAX_FORMS) forms.erase(forms.begin());
        forms.push_back(std::move(form));
        return place;
    }
    void forget(int64_t place) {
        const std::unique_lock<std::shared_mutex> held(mutex_);
        forms_.erase(place);
    }
    /* Null where none takes the tensors, and where their device is not the current one. */
    std::shared_ptr<const Form> find(int64_t place, const Tensor *tensors, size_t count, Call &call) const {
        const std::shared_lock<std::shared_mutex> held(mutex_);
        const auto found = forms_.find(place);
        if (found != forms_.end())
            for (auto form = found->second.rbegin(); form != found->second.rend(); ++form)
                if ((*form)->fits(tensors, count, call) && current_stream((*form)->device(), call.stream)) return *form;
        return nullptr;
    }

  private:
    mutable std::shared_mutex mutex_;
    std::unordered_map<int64_t, std::vector<std::shared_ptr<const Form>>> forms_;
    int64_t last_ = 0;
};

Places &places() {
    static Places *const kept = new Places; /* Threads may call while the process ends. */
    return *kept;
}

} // namespace

void launches_keep(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor code(stack[0]);
    const int64_t place = scalar<int64_t>(stack[1]);
    const heedful_tensor numbers = view(code, "code");
    if (numbers.dtype != HEEDFUL_INT64 || numbers.ndim != 1 || numbers.stride[0] != 1)
        fail("code takes a contiguous int64 tensor of one dimension");
    if (cuda_driver().launch_kernel == nullptr) {
        stack[0] = static_cast<StableIValue>(-1);
        return;
    }
    const auto form = std::make_shared<const Form>(Reader(numbers));
    stack[0] = static_cast<StableIValue>(form->agrees() ? places().keep(form, place) : -1);
}

void launches_forget(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor place(stack[0]);
    places().forget(only_element(place, "place"));
}

void launches_run(StableIValue *stack, uint64_t, uint64_t) {
    const std::vector<Tensor> tensors = List(stack[0]).take<Tensor>();
    Call call;
    std::vector<Tensor> made;
    if (const auto form = places().find(scalar<int64_t>(stack[1]), tensors.data(), tensors.size(), call))
        made = form->run(call);
    StableListHandle results = nullptr;
    if (torch_new_list_reserve_size(made.size(), &results) != 0) fail("heedful: torch refused a list");
    for (Tensor &tensor : made)
        if (torch_list_push_back(results, tensor.release()) != 0) fail("heedful: torch refused a result");
    stack[0] = reinterpret_cast<StableIValue>(results);
}

void launches_run_one(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor tensors[] = {Tensor(stack[0]), Tensor(stack[1]), Tensor(stack[2])};
    Call call;
    std::vector<Tensor> made;
    if (const auto form = places().find(scalar<int64_t>(stack[3]), tensors, 3, call)) made = form->run(call);
    stack[0] = made.empty() ? 0 : reinterpret_cast<StableIValue>(new StableIValue(made.front().release()));
}

void launches_time(StableIValue *stack, uint64_t, uint64_t) {
    const std::vector<Tensor> tensors = List(stack[0]).take<Tensor>();
    Call call;
    const auto form = places().find(scalar<int64_t>(stack[1]), tensors.data(), tensors.size(), call);
    if (form == nullptr) fail("no form at this place takes these tensors");
    double seconds = 0;
    form->run(call, scalar<int64_t>(stack[2]), &seconds);
    std::memcpy(&stack[0], &seconds, sizeof seconds);
}

} // namespace heedful
