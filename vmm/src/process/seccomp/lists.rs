//! Which system calls each kind of thread may make.
//!
//! Lists are as short as a test can prove (`vmm/tests/calls.rs`): what no thread of a kind ever
//! made, and [`RARE`] does not excuse, is not on its list.

use crate::devices::DeviceKind;

/// A kind of thread of a guest's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Loads the image, starts the other threads and runs the guest. A device's thread is started
    /// by the vCPU whose driver asks for it and inherits its filter below its own, so that this list
    /// holds theirs.
    Vcpu,
    /// Answers requests on the control socket.
    Control,
    /// Serves the queues of a device.
    Device(DeviceKind),
}

impl Role {
    /// Every role that has a list.
    pub const ALL: [Role; 7] = [
        Role::Vcpu,
        Role::Control,
        Role::Device(DeviceKind::Disk),
        Role::Device(DeviceKind::Net),
        Role::Device(DeviceKind::Rng),
        Role::Device(DeviceKind::Balloon),
        Role::Device(DeviceKind::Vsock),
    ];

    /// Name of its threads, as the host's tools show them.
    pub const fn thread_name(self) -> &'static str {
        match self {
            Role::Vcpu => "vcpu",
            Role::Control => "control",
            Role::Device(DeviceKind::Disk) => "disk",
            Role::Device(DeviceKind::Net) => "net",
            Role::Device(DeviceKind::Rng) => "rng",
            Role::Device(DeviceKind::Balloon) => "balloon",
            Role::Device(DeviceKind::Vsock) => "vsock",
        }
    }

    /// What its threads may call.
    pub fn allowed(self) -> Allowed {
        let mut allowed = Allowed::default();
        allowed.add(&EVERY);
        if cfg!(debug_assertions) {
            allowed.add(&DEBUG);
        }
        match self {
            Role::Vcpu => {
                allowed.add(&VCPU);
                let devices = Role::ALL.iter().filter(|role| matches!(role, Role::Device(_)));
                devices.for_each(|device| allowed.add(&device.own()));
            }
            Role::Control | Role::Device(_) => allowed.add(&self.own()),
        }
        allowed
    }

    fn own(self) -> List {
        match self {
            Role::Vcpu => VCPU,
            Role::Control => CONTROL,
            Role::Device(DeviceKind::Disk) => DISK,
            Role::Device(DeviceKind::Net) => NET,
            Role::Device(DeviceKind::Rng) => RNG,
            Role::Device(DeviceKind::Balloon) => BALLOON,
            Role::Device(DeviceKind::Vsock) => VSOCK,
        }
    }
}

/// A part of what a role may call.
#[derive(Clone, Copy)]
struct List {
    calls: &'static [libc::c_long],
    ioctls: &'static [u32],
    fcntls: &'static [libc::c_int],
    prctls: &'static [libc::c_int],
}

/// All that a role may call, without repetitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Calls with any arguments.
    pub calls: Vec<libc::c_long>,
    /// Requests of `ioctl`.
    pub ioctls: Vec<u32>,
    /// Commands of `fcntl`.
    pub fcntls: Vec<u32>,
    /// Options of `prctl`.
    pub prctls: Vec<u32>,
}

impl Allowed {
    fn add(&mut self, list: &List) {
        fn add<T: Copy + PartialEq>(to: &mut Vec<T>, from: impl Iterator<Item = T>) {
            for item in from {
                if !to.contains(&item) {
                    to.push(item);
                }
            }
        }
        add(&mut self.calls, list.calls.iter().copied());
        add(&mut self.ioctls, list.ioctls.iter().copied());
        add(&mut self.fcntls, list.fcntls.iter().map(|command| *command as u32));
        add(&mut self.prctls, list.prctls.iter().map(|option| *option as u32));
    }
}

const SIGNAL_MSI: u32 = 0x4020_AEA5;
const KVM_IOEVENTFD: u32 = 0x4040_AE79;

/// Every thread: memory, locks, starting, ending, and the process's end with its record.
const EVERY: List = List {
    calls: &[
        libc::SYS_futex,
        libc::SYS_write,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_mremap,
        libc::SYS_brk,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_sched_yield,
        libc::SYS_clock_gettime,
        libc::SYS_restart_syscall,
        libc::SYS_pwrite64,
        libc::SYS_close,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ],
    ioctls: &[SIGNAL_MSI],
    fcntls: &[],
    prctls: &[],
};

/// Every thread of a build with debug assertions: a descriptor that is closed must be open.
const DEBUG: List = List { calls: &[], ioctls: &[], fcntls: &[libc::F_GETFD], prctls: &[] };

const VCPU: List = List {
    calls: &[
        libc::SYS_pread64,
        libc::SYS_fstat,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_sched_getaffinity,
        libc::SYS_getpid,
        libc::SYS_eventfd2,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        // A thread takes its own filter, which can only be narrower.
        libc::SYS_seccomp,
    ],
    ioctls: &[
        0xAE80, // KVM_RUN
        KVM_IOEVENTFD,
        0x8090_AE81, // KVM_GET_REGS
        0x4090_AE82, // KVM_SET_REGS
        0x8138_AE83, // KVM_GET_SREGS
        0x4138_AE84, // KVM_SET_SREGS
        0x4008_AE89, // KVM_SET_MSRS
    ],
    fcntls: &[libc::F_DUPFD_CLOEXEC],
    prctls: &[libc::PR_SET_NAME],
};

const CONTROL: List = List {
    calls: &[
        libc::SYS_accept4,
        libc::SYS_read,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_lseek,
        libc::SYS_fstat,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_sched_getaffinity,
        libc::SYS_tgkill,
        libc::SYS_eventfd2,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_clock_nanosleep,
    ],
    ioctls: &[
        0x5421, // FIONBIO
        // A device is pulled out.
        KVM_IOEVENTFD,
    ],
    fcntls: &[libc::F_DUPFD_CLOEXEC, libc::F_GET_SEALS],
    prctls: &[libc::PR_SET_NAME],
};

const DISK: List = List {
    calls: &[
        libc::SYS_read,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        // A ring of its own, made and restricted before; none can be made inside.
        libc::SYS_io_uring_enter,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
    ],
    ioctls: &[],
    fcntls: &[],
    prctls: &[],
};

const NET: List = waits(&[libc::SYS_read, libc::SYS_write, libc::SYS_poll, libc::SYS_ppoll]);

const RNG: List = waits(&[libc::SYS_read, libc::SYS_poll, libc::SYS_ppoll, libc::SYS_getrandom]);

const BALLOON: List = waits(&[libc::SYS_read, libc::SYS_poll, libc::SYS_ppoll]);

const VSOCK: List = List {
    calls: &[
        libc::SYS_read,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_accept4,
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
        libc::SYS_shutdown,
    ],
    ioctls: &[
        0x5421, // FIONBIO
    ],
    fcntls: &[],
    prctls: &[],
};

/// A device's thread that makes no call whose arguments matter, but for its interrupts.
const fn waits(calls: &'static [libc::c_long]) -> List {
    List { calls, ioctls: &[], fcntls: &[], prctls: &[] }
}

/// Calls that are allowed although a run need not make them, and why.
pub const RARE: &[(libc::c_long, &str)] = &[
    (libc::SYS_mremap, "a large allocation grows"),
    (libc::SYS_madvise, "the allocator gives memory back, a thread its stack"),
    (libc::SYS_brk, "the allocator of the first thread needs more"),
    (libc::SYS_mprotect, "the allocator of another thread needs more"),
    (libc::SYS_munmap, "a large allocation is freed"),
    (libc::SYS_mmap, "the first allocation of a thread, or a large one"),
    (libc::SYS_write, "what was refused is said on standard error"),
    (libc::SYS_futex, "a lock is taken"),
    (libc::SYS_rt_sigaction, "the first thread that a process without a control socket starts"),
    (libc::SYS_rt_sigreturn, "a signal was handled"),
    (libc::SYS_restart_syscall, "the process was stopped and goes on"),
    (libc::SYS_clock_gettime, "the clock is not readable without a call"),
    (libc::SYS_sched_yield, "a queue of the standard library is contended"),
    (libc::SYS_pwrite64, "the exit record and the console's ring"),
    (libc::SYS_exit_group, "the thread ends the process"),
    (libc::SYS_clone, "the C library has no clone3"),
    (libc::SYS_poll, "the C library's name for ppoll"),
    (libc::SYS_sendto, "an answer does not go out in one piece"),
    (libc::SYS_clock_nanosleep, "the host is out of descriptors"),
];
