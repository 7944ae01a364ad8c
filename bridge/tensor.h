/* Owning handles of torch's tensors and lists, and their view as the engine sees them. */
#ifndef HEEDFUL_BRIDGE_TENSOR_H
#define HEEDFUL_BRIDGE_TENSOR_H

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "heedful.h"
#include "torch_shim.h"

namespace heedful {

/* Raises a RuntimeError in Python. */
[[noreturn]] void fail(const std::string &message);

/* Owns one reference to a torch tensor, or none where an optional one is absent. */
class Tensor {
  public:
    explicit Tensor(StableIValue value) : handle_(reinterpret_cast<AtenTensorHandle>(value)) {}
    Tensor(Tensor &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;
    Tensor &operator=(Tensor &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
    }

    /* An operator's argument of type Tensor?. */
    static Tensor optional(StableIValue value);

    /* An uninitialised CPU tensor and, in `view`, the engine's view of it; sizes and strides are of one length. */
    static Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                        heedful_dtype dtype, heedful_tensor &view);
    static Tensor empty(int64_t ndim, const int64_t *sizes, const int64_t *strides, heedful_dtype dtype);

    /* Null where there is none. */
    AtenTensorHandle get() const { return handle_; }
    /* Hands the reference over, as an operator's result. */
    StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

  private:
    AtenTensorHandle handle_;
};

/* Owns a list that an operator was passed, until its elements are taken. */
class List {
  public:
    explicit List(StableIValue value) : handle_(reinterpret_cast<StableListHandle>(value)) {}
    List(const List &) = delete;
    List &operator=(const List &) = delete;
    ~List() { torch_delete_list(handle_); }

    /* The elements, each made an Element; of a list of tensors every reference passes to the result. */
    template <typename Element> std::vector<Element> take() const {
        size_t size = 0;
        if (torch_list_size(handle_, &size) != 0) fail("heedful: torch refused the length of a list");
        std::vector<Element> elements;
        elements.reserve(size);
        for (size_t index = 0; index < size; ++index) {
            StableIValue value = 0;
            if (torch_list_get_item(handle_, index, &value) != 0) fail("heedful: torch refused an element of a list");
            elements.emplace_back(static_cast<Element>(value));
        }
        return elements;
    }

  private:
    StableListHandle handle_;
};

/* torch's code of a dtype; fails where there is none. */
int32_t torch_dtype(heedful_dtype dtype);

/* The dtype of a CPU tensor; fails by name where the engine has none such, and on a tensor elsewhere. */
heedful_dtype dtype_on_cpu(const Tensor &tensor, const char *name);

/* The engine's view of a strided CPU tensor of at most 4 dimensions; fails by name on any other. A tensor without
 * dimensions is seen as one element in one dimension. */
heedful_tensor view(const Tensor &tensor, const char *name);

} // namespace heedful

#endif
