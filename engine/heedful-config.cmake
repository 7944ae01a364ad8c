# The library and its header as the target heedful::engine, found from where this file lies.
if(NOT TARGET heedful::engine)
  get_filename_component(heedful_library_dir ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
  get_filename_component(heedful_include_dir ${heedful_library_dir}/../include ABSOLUTE)
  add_library(heedful::engine SHARED IMPORTED)
  set_target_properties(heedful::engine PROPERTIES
    IMPORTED_LOCATION ${heedful_library_dir}/libheedful_engine.so
    IMPORTED_SONAME libheedful_engine.so
    INTERFACE_INCLUDE_DIRECTORIES ${heedful_include_dir})
endif()
