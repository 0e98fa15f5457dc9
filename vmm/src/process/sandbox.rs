//! How tightly a guest's process is closed.
//!
//! What costs much is made once by the process that starts guests, and inherited by them: empty
//! mount, network and IPC namespaces, the compiled system call filter, the Landlock ruleset. Each
//! guest then gives up its identity, capabilities and system calls. Two tiers:
//!
//! - as root: namespaces, a uid and cgroups of its own, Landlock, seccomp;
//! - as an ordinary user: a user namespace (with the others) where the host allows it, Landlock,
//!   seccomp.

use super::seccomp::{self, Role};
use crate::config;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Why a process could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused a step that is not optional.
    #[error("sandbox: {step}: {source}")]
    Step {
        /// The step.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A cgroup could not be entered.
    #[error("sandbox: enter cgroup {path}: {source}")]
    Cgroup {
        /// Its directory.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another uid was asked for without the right to take it.
    #[error("sandbox: uid {0} can be taken only by root")]
    Uid(u32),
}

/// What was prepared once.
pub struct Sandbox {
    filters: seccomp::Filters,
    ruleset: Option<OwnedFd>,
    root: bool,
    namespaces: Result<(), String>,
    host_root: Option<OwnedFd>,
}

impl Sandbox {
    /// Prepares and moves this process into empty namespaces where the host allows it.
    pub fn prepare() -> Result<Sandbox, SandboxError> {
        let filters = seccomp::Filters::compile();
        seccomp::prepare();
        let ruleset = landlock_ruleset();
        let root = rustix::process::geteuid().is_root();
        let host_root = open_root().ok();
        let namespaces = enter_namespaces(root).map_err(|(step, error)| format!("{step}: {error}"));
        Ok(Sandbox { filters, ruleset, root, namespaces, host_root })
    }

    /// The tier in words.
    pub fn tier(&self) -> String {
        let who = if self.root { "root" } else { "user" };
        let namespaces = match &self.namespaces {
            Ok(()) if self.root => "mount, network and IPC namespaces".to_string(),
            Ok(()) => "user, mount, network and IPC namespaces".to_string(),
            Err(why) => format!("no namespaces ({why})"),
        };
        let landlock = if self.ruleset.is_some() { "Landlock" } else { "no Landlock" };
        let uid = if self.root { ", uid and cgroups per guest" } else { "" };
        format!("{who}: {namespaces}, {landlock}, seccomp, no capabilities{uid}")
    }

    /// Enters the guest's cgroups, while this process still may.
    pub fn enter_cgroups(&self, sandbox: &config::Sandbox) -> Result<(), SandboxError> {
        for directory in &sandbox.cgroups {
            self.enter_cgroup(directory).map_err(|source| SandboxError::Cgroup {
                path: directory.display().to_string(),
                source,
            })?;
        }
        Ok(())
    }

    fn enter_cgroup(&self, directory: &Path) -> io::Result<()> {
        let relative = directory.strip_prefix("/").unwrap_or(directory).join("cgroup.procs");
        let root = self.host_root.as_ref().ok_or(io::ErrorKind::PermissionDenied)?;
        let procs = rustix::fs::openat(
            root,
            &relative,
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        rustix::io::write(&procs, b"0")?;
        Ok(())
    }

    /// Gives up identity, capabilities and every path for good, for this thread (the only one) and
    /// those it starts. System calls are closed by each thread itself: [`seccomp::narrow`], the
    /// first thing it does from here. `record` gets the exit record of a violation.
    pub fn close(
        self,
        sandbox: &config::Sandbox,
        record: Option<RawFd>,
        nonce: &str,
    ) -> Result<(), SandboxError> {
        drop(self.host_root);
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(step("no_new_privs"))?;
        if let Some(uid) = sandbox.uid {
            if !self.root {
                return Err(SandboxError::Uid(uid));
            }
            take_identity(uid).map_err(step("take the guest's uid"))?;
        }
        drop_capabilities().map_err(step("drop capabilities"))?;
        prctl(libc::PR_SET_DUMPABLE, 0).map_err(step("no dumps"))?;
        if let Some(ruleset) = self.ruleset {
            // SAFETY: a plain system call on a descriptor of ours.
            let result =
                unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
            check(result).map_err(step("Landlock"))?;
        }
        seccomp::arm(self.filters, record, nonce);
        Ok(())
    }
}

/// Closes the calling thread to all but its role's system calls.
pub fn narrow(role: Role) -> Result<(), SandboxError> {
    seccomp::narrow(role).map_err(step("seccomp"))
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Step { step, source }
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used take integers only.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) }.into()).map(drop)
}

fn open_root() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// uid = gid = the guest's, no other groups; for this thread, which is the only one.
fn take_identity(uid: u32) -> io::Result<()> {
    // SAFETY: plain system calls on integers.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        check(libc::syscall(libc::SYS_setresgid, uid, uid, uid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: the layouts are the kernel's for version 3: a header of two words, two sets of three.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) }).map(drop)
}

/// A ruleset that handles everything this kernel knows and allows nothing; `None` without Landlock.
fn landlock_ruleset() -> Option<OwnedFd> {
    const VERSION: libc::c_long = 1;
    // SAFETY: asks for the version only.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION)
    };
    let (file_rights, size) = match abi {
        ..=0 => return None,
        1 => (13, 8),
        2 => (14, 8),
        3 => (15, 8),
        4 => (15, 16),
        5 => (16, 16),
        _ => (16, 24),
    };
    const NET_TCP: u64 = 0b11;
    const SCOPE_ABSTRACT_UNIX: u64 = 0b1;
    let attributes: [u64; 3] = [(1 << file_rights) - 1, NET_TCP, SCOPE_ABSTRACT_UNIX];
    // SAFETY: `size` bytes of the attributes are valid for this version of the interface.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, attributes.as_ptr(), size as usize, 0)
    };
    // SAFETY: a fresh descriptor, ours.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

type Refused = (&'static str, io::Error);

fn enter_namespaces(root: bool) -> Result<(), Refused> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
    if !root {
        flags |= libc::CLONE_NEWUSER;
    }
    // SAFETY: no memory is involved; this process has one thread.
    check(unsafe { libc::unshare(flags) }.into()).map_err(|error| ("unshare", error))?;
    if !root {
        let write = |path: &str, text: String| {
            std::fs::write(path, text).map_err(|error| ("user namespace", error))
        };
        write("/proc/self/setgroups", "deny".into())?;
        write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
        write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    }
    empty_root().map_err(|error| ("empty root", error))
}

/// Replaces the root by an empty, read-only file system.
fn empty_root() -> io::Result<()> {
    let locked = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE, None)?;
    let over = [c"/proc", c"/tmp", c"/dev"]
        .into_iter()
        .find(|over| {
            mount(Some(c"tmpfs"), over, locked, Some(c"size=0,nr_inodes=1")).is_ok()
                || mount(Some(c"tmpfs"), over, locked, None).is_ok()
        })
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the strings are terminated and live through the calls.
    unsafe {
        check(libc::chdir(over.as_ptr()).into())?;
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
        check(libc::chdir(c"/".as_ptr()).into())?;
    }
    mount(None, c"/", libc::MS_REMOUNT | libc::MS_RDONLY | locked, None)
}

fn mount(
    kind: Option<&CStr>,
    target: &CStr,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: the strings are terminated and live through the call.
    let result = unsafe {
        libc::mount(pointer(kind), target.as_ptr(), pointer(kind), flags, pointer(data).cast())
    };
    check(result.into()).map(drop)
}
