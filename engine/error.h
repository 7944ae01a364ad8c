// Errors inside the engine: thrown here, turned into a status and a message at the C boundary.
#pragma once

#include <stdexcept>
#include <string>

#include "heedful.h"

namespace heedful {

struct Error : std::runtime_error {
    heedful_status status;
    Error(heedful_status status, const std::string &text) : std::runtime_error(text), status(status) {}
};

// A macro, because building the texts of checks that pass took a third of a small call.
#define REQUIRE(condition, text)                                                                                       \
    do {                                                                                                               \
        if (!(condition)) throw heedful::Error(HEEDFUL_INVALID_ARGUMENT, text);                                        \
    } while (0)

void set_error_message(const char *text);

// Runs a C entry point's body: no exception leaves it.
template <class Body> heedful_status guarded(Body body) {
    try {
        body();
        return HEEDFUL_OK;
    } catch (const Error &error) {
        set_error_message(error.what());
        return error.status;
    } catch (const std::bad_alloc &) {
        set_error_message("out of memory");
        return HEEDFUL_OUT_OF_MEMORY;
    } catch (const std::exception &error) {
        set_error_message(error.what());
        return HEEDFUL_INVALID_ARGUMENT;
    }
}

} // namespace heedful
