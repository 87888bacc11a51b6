// What Python dictionaries and the classes of Python objects are at one moment, for
// effnet_kernels/modules/replay.py, which asks before every replay whether all modules of a model are as they
// were: hundreds of dictionaries that the kernels have pushed out of the caches.
//
// Python's limited API, functions only: one library serves every Python. Called through ctypes.PyDLL, with
// the GIL.
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <vector>

namespace {

class Snapshot {
 public:
  // dicts: a list of dictionaries; objects: a list. Values that are dictionaries themselves are left out.
  Snapshot(PyObject* dicts, PyObject* objects) {
    for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
      PyObject *dict = PyList_GetItem(dicts, i), *key = nullptr, *value = nullptr;
      const size_t begin = entries_.size();
      Py_ssize_t next = 0;
      for (Py_ssize_t at = 0; PyDict_Next(dict, &next, &key, &value); at = next)
        if (PyObject_IsInstance(value, reinterpret_cast<PyObject*>(&PyDict_Type)) == 0)
          entries_.push_back({at, hold(key), hold(value)});
      dicts_.push_back({hold(dict), PyDict_Size(dict), begin, entries_.size()});
    }
    for (Py_ssize_t i = 0; i < PyList_Size(objects); ++i) {
      PyObject* const object = PyList_GetItem(objects, i);
      objects_.push_back({hold(object), PyObject_Type(object)});
    }
  }
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  // What was held until now kept its address for itself: nothing else could pass for it.
  ~Snapshot() {
    for (const Entry& entry : entries_) {
      Py_DecRef(entry.key);
      Py_DecRef(entry.value);
    }
    for (const Dict& d : dicts_) Py_DecRef(d.dict);
    for (const Object& o : objects_) {
      Py_DecRef(o.object);
      Py_DecRef(o.cls);
    }
  }

  // Whether every dictionary has the same size and entries, and every object the same class. Little of it is
  // in the caches, so first a few instructions for each dictionary: the processor fetches several at a time.
  bool holds() const {
    for (const Dict& d : dicts_)
      if (PyDict_Size(d.dict) != d.size) return false;
    for (const Object& o : objects_) {
      PyObject* const cls = PyObject_Type(o.object);
      Py_DecRef(cls);
      if (cls != o.cls) return false;
    }
    for (const Dict& d : dicts_)
      if (d.begin != d.end && !same(d, d.end - 1)) return false;
    for (const Dict& d : dicts_)
      for (size_t i = d.begin; i + 1 < d.end; ++i)
        if (!same(d, i)) return false;
    return true;
  }

 private:
  struct Entry {
    Py_ssize_t at;  // PyDict_Next's position
    PyObject *key, *value;
  };
  struct Dict {
    PyObject* dict;
    Py_ssize_t size;
    size_t begin, end;  // of its entries
  };
  struct Object {
    PyObject *object, *cls;
  };

  bool same(const Dict& d, size_t i) const {
    const Entry& entry = entries_[i];
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = entry.at;  // checked by PyDict_Next, and by the key that is found there
    return PyDict_Next(d.dict, &at, &key, &value) && key == entry.key && value == entry.value;
  }

  static PyObject* hold(PyObject* object) {
    Py_IncRef(object);
    return object;
  }

  std::vector<Entry> entries_;  // of all dictionaries, one after the other
  std::vector<Dict> dicts_;
  std::vector<Object> objects_;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Snapshot* effnet_snapshot(PyObject* dicts, PyObject* objects) { return new Snapshot(dicts, objects); }
EXPORT int effnet_snapshot_holds(const Snapshot* snapshot) { return snapshot->holds(); }
EXPORT void effnet_snapshot_forget(Snapshot* snapshot) { delete snapshot; }

#endif  // Python.h
