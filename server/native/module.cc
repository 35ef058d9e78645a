// The Python module `aqt_server._door`: class Door, as `_door.pyi` describes it.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "door.h"
#include "grpc.h"

namespace {

using door::Door;
using door::Limits;
using door::Request;
using door::Response;

struct Object {
  PyObject_HEAD
  Door* door;
};

Door& of(PyObject* self) { return *reinterpret_cast<Object*>(self)->door; }

PyObject* latin1(const std::string& text) {
  return PyUnicode_DecodeLatin1(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr);
}

// Sets the Python error that stands for the C++ one that is being handled.
void translate() {
  try {
    throw;
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, Py_BuildValue("(is)", error.code().value(), error.what()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* named) {
  static const char* names[] = {"host",           "port",        "paths", "message_bytes",
                                "buffered_bytes", "connections", "calls", "streams",
                                "header_bytes",   "idle_s",      nullptr};
  const char *host, *port;
  Py_ssize_t message, buffered, connections, calls, streams, headers;
  double idle_s;
  PyObject* paths;
  if (!PyArg_ParseTupleAndKeywords(arguments, named, "ssO!nnnnnnd", const_cast<char**>(names),
                                   &host, &port, &PyList_Type, &paths, &message, &buffered,
                                   &connections, &calls, &streams, &headers, &idle_s)) {
    return nullptr;
  }
  auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* self = allocate(type, 0);
  if (!self) return nullptr;
  try {
    Limits limits{.message_bytes = static_cast<size_t>(message),
                        .buffered_bytes = static_cast<size_t>(buffered),
                        .connections = static_cast<size_t>(connections),
                        .calls = static_cast<size_t>(calls),
                        .streams = static_cast<uint32_t>(streams),
                        .header_bytes = static_cast<size_t>(headers),
                        .idle_s = idle_s};
    for (Py_ssize_t i = 0; i < PyList_Size(paths); ++i) {
      const char* path = PyUnicode_AsUTF8AndSize(PyList_GetItem(paths, i), nullptr);
      if (!path) {
        Py_DECREF(self);
        return nullptr;
      }
      limits.paths.insert(path);
    }
    reinterpret_cast<Object*>(self)->door = new Door(host, port, limits);
  } catch (...) {
    translate();
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Door* door = reinterpret_cast<Object*>(self)->door;
  Py_BEGIN_ALLOW_THREADS
  delete door;
  Py_END_ALLOW_THREADS
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* start(PyObject* self, PyObject*) {
  try {
    of(self).start();
  } catch (...) {
    translate();
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* port(PyObject* self, PyObject*) { return PyLong_FromLong(of(self).port()); }

PyObject* fileno(PyObject* self, PyObject*) { return PyLong_FromLong(of(self).notifications()); }

PyObject* take(PyObject* self, PyObject*) {
  const door::Taken taken = of(self).take();
  PyObject* requests = PyList_New(0);
  PyObject* gone = PyList_New(0);
  bool made = requests && gone;
  for (const Request& request : taken.requests) {
    if (!made) break;
    PyObject* tuple = Py_BuildValue(
        "(KNy#NiNy#d)", static_cast<unsigned long long>(request.call), latin1(request.path),
        request.headers.data(), static_cast<Py_ssize_t>(request.headers.size()),
        latin1(request.peer), static_cast<int>(request.body[0]), latin1(request.encoding),
        request.body.data() + door::kPrefix,
        static_cast<Py_ssize_t>(request.body.size() - door::kPrefix), request.timeout_s);
    made = tuple && !PyList_Append(requests, tuple);
    Py_XDECREF(tuple);
  }
  for (const uint64_t call : taken.gone) {
    if (!made) break;
    PyObject* number = PyLong_FromUnsignedLongLong(call);
    made = number && !PyList_Append(gone, number);
    Py_XDECREF(number);
  }
  if (!made) {
    Py_XDECREF(requests);
    Py_XDECREF(gone);
    return nullptr;
  }
  return Py_BuildValue("(NN)", requests, gone);
}

// The prefix of a message of so many bytes, not compressed.
std::string with_prefix(const char* message, size_t size) {
  std::string body;
  body.reserve(size + door::kPrefix);
  body.push_back(0);
  for (int shift = 24; shift >= 0; shift -= 8) body.push_back(static_cast<char>(size >> shift));
  return body.append(message, size);
}

PyObject* answer(PyObject* self, PyObject* answers) {
  const Py_ssize_t count = PyList_Size(answers);
  if (count < 0) return nullptr;
  std::vector<Response> responses;
  responses.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    unsigned long long call;
    int status;
    const char *sentence, *trailers, *message;
    Py_ssize_t sentence_size, trailers_size, message_size;
    if (!PyArg_ParseTuple(PyList_GetItem(answers, i), "Kis#y#y#", &call, &status, &sentence,
                          &sentence_size, &trailers, &trailers_size, &message, &message_size)) {
      return nullptr;
    }
    responses.push_back({call, status, std::string(sentence, sentence_size),
                         std::string(trailers, trailers_size),
                         status ? std::string() : with_prefix(message, message_size)});
  }
  of(self).answer(std::move(responses));
  Py_RETURN_NONE;
}

PyObject* close(PyObject* self, PyObject* grace) {
  const double grace_s = PyFloat_AsDouble(grace);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  of(self).close(grace_s);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"start", start, METH_NOARGS, nullptr},   {"port", port, METH_NOARGS, nullptr},
    {"fileno", fileno, METH_NOARGS, nullptr}, {"take", take, METH_NOARGS, nullptr},
    {"answer", answer, METH_O, nullptr},      {"close", close, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"aqt_server._door.Door", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_door", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__door() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* type = module ? PyType_FromSpec(&spec) : nullptr;
  if (!type || PyModule_AddObject(module, "Door", type)) {
    Py_XDECREF(type);
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
