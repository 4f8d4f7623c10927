"""Lets a library that is linked on a new system run on an old one; imported by build_cuda.py.

CUDA's runtime, which is linked into _cuda.so, calls functions of threads and of dynamic loading. glibc 2.34 moved them
into libc.so.6 under a version of its own, and a linker takes the newest version that it finds. Here it finds the old
one first: in libraries that have nothing but the names, and that the loader replaces by the real ones.
"""

from pathlib import Path

from building import make

# What CUDA's runtime calls, by the library that has it in glibc before 2.34, and the version that it has there.
MOVED = {
    "libpthread.so.0": {
        "GLIBC_2.2.5": (
            "pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join "
            "pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy "
            "pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once "
            "pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock "
            "pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock "
            "pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared "
            "pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock "
            "pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait"
        )
    },
    "libdl.so.2": {"GLIBC_2.2.5": "dlclose dlerror dlopen dlsym dlvsym", "GLIBC_2.3.4": "dlmopen"},
    "librt.so.1": {"GLIBC_2.2.5": "shm_open shm_unlink"},
}


def libraries(cxx: list[str], folder: Path) -> list[Path]:
    """Libraries to be named before all others, for an x86-64."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, versions in MOVED.items():
        source, script = folder / f"{name}.c", folder / f"{name}.map"
        functions = [function for names in versions.values() for function in names.split()]
        source.write_text("".join(f"void {function}(void) {{}}\n" for function in functions))
        script.write_text(
            "".join(f"{version} {{ global: {names.replace(' ', '; ')}; }};\n" for version, names in versions.items())
        )
        command = [*cxx, "-shared", "-fPIC", "-fno-builtin", "-nostdlib", "-x", "c", str(source), f"-Wl,-soname,{name}"]
        command += [f"-Wl,--version-script={script}"]
        made.append(make(folder / f"lib{name.partition('.')[0]}_old.so", command, "", inputs=[source, script]))
    return made
