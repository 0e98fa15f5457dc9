//! One launch, measured: what `trine bench launch` repeats for `floor`, `cold/no-devices` and
//! `cold/devices`.
//!
//! All three are forked by the same spawner in the same way, and t0 is its clock just before the
//! fork. The end is the guest's first port write: for the floor seen by the program itself, for
//! the others the write of `MARK_MAIN`.

pub mod block;
pub mod memory;
pub mod trace;

use crate::config::{Boot, DiskConfig, DiskSource, NetBackend, NetConfig, Resource, VmConfig};
use crate::control::ExitRecord;
use crate::spawner::{Client, SpawnError, Spawned};
use abi::packet_ring::Region;
use memory::Memory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Longest exit record read.
const RECORD_BYTES_MAX: usize = 4096;
/// Size of the disk of `cold/devices`.
const DISK_BYTES: u64 = 64 << 20;

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From before the clone to the guest's first port write, ns.
    pub launch_ns: u64,
    /// From before the clone to the end of the process, ns.
    pub exit_ns: u64,
    /// CPU time of the guest's process, ns.
    pub cpu_ns: u64,
    /// Of `launch_ns`: until the process ran its first statement.
    pub fork_ns: u64,
    /// Of `launch_ns`: until the vCPU was about to run.
    pub built_ns: u64,
    /// Exits to the VMM up to the guest's mark, its own among them.
    pub exits: u32,
}

/// Why a launch could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The guest did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A resource for it could not be made.
    #[error("prepare a launch: {0}")]
    Prepare(#[from] io::Error),
    /// Its system calls could not be counted.
    #[error("trace the spawner's processes by ptrace, which this host must allow: {0}")]
    Trace(#[source] io::Error),
    /// It ended without its mark.
    #[error("the guest ended without its mark: {0}")]
    NoMark(String),
}

/// With which devices a guest is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// None.
    None,
    /// A disk and a network device on a packet ring.
    BlockAndNet,
}

/// Runs `kvm-floor` once.
pub fn floor(spawner: &Client, executable: &File, memory_mib: u32) -> Result<Sample, BenchError> {
    let times = spawner.run_floor(executable.as_fd(), memory_mib)?;
    Ok(Sample {
        launch_ns: times.first_exit_ns.saturating_sub(times.spawn_ns),
        exit_ns: times.exit_ns.saturating_sub(times.spawn_ns),
        cpu_ns: times.cpu_ns,
        fork_ns: 0,
        built_ns: 0,
        exits: 1,
    })
}

/// What is launched.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The kernel, open.
    pub kernel: &'a File,
    /// Its command line.
    pub cmdline: &'a str,
    /// Memory of its guest.
    pub memory_mib: u32,
}

/// Launches `image` once; it must end by itself soon after its mark ([`crate::probe::image`], or
/// the built-in guest with `exit-after-main` on its command line).
pub fn launch(spawner: &Client, image: Image<'_>, devices: Devices) -> Result<Sample, BenchError> {
    Running::start(spawner, image, devices)?.wait()
}

/// A guest that runs.
pub struct Running {
    guest: Spawned,
    record: File,
    memory_mib: u32,
    // What its devices are connected to.
    _plugged: Vec<OwnedFd>,
}

impl Running {
    /// Starts a guest.
    pub fn start(
        spawner: &Client,
        image: Image<'_>,
        devices: Devices,
    ) -> Result<Running, BenchError> {
        let record = memory_file("exit-record", 0)?;
        let mut config = config(image);
        let plugged = match devices {
            Devices::None => Vec::new(),
            Devices::BlockAndNet => plug(&mut config)?,
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![image.kernel.as_fd(), record.as_fd()];
        descriptors.extend(plugged.iter().map(AsFd::as_fd));
        let guest = spawner.spawn(&config, &descriptors)?;
        Ok(Running { guest, record, memory_mib: image.memory_mib, _plugged: plugged })
    }

    /// Memory of its process, as of now.
    pub fn memory(&self) -> io::Result<Memory> {
        Memory::of(self.guest.pid, self.memory_mib)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> io::Result<bool> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(poll(&mut [PollFd::new(&self.guest.pidfd, PollFlags::IN)], Some(&now))? > 0)
    }

    /// Waits for its end.
    pub fn wait(self) -> Result<Sample, BenchError> {
        poll(&mut [PollFd::new(&self.guest.pidfd, PollFlags::IN)], None)
            .map_err(io::Error::from)?;
        let ended_ns = crate::process::timings::now_ns();
        sample(&self.record, ended_ns)
    }

    /// Ends it and waits until it has ended.
    pub fn kill(self) -> Result<(), BenchError> {
        let _ = rustix::process::pidfd_send_signal(&self.guest.pidfd, Signal::KILL);
        poll(&mut [PollFd::new(&self.guest.pidfd, PollFlags::IN)], None)
            .map_err(io::Error::from)?;
        Ok(())
    }
}

impl Drop for Running {
    /// A measurement that fails leaves no guest behind.
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.guest.pidfd, Signal::KILL);
    }
}

fn memory_file(name: &str, bytes: u64) -> io::Result<File> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(File::from(file))
}

/// The configuration of a guest without devices: descriptor 0 is its kernel, 1 its exit record.
pub fn config(image: Image<'_>) -> VmConfig {
    VmConfig {
        version: 1,
        id: "bench".into(),
        nonce: String::new(),
        vcpus: 1,
        memory_mib: image.memory_mib,
        huge_pages: Default::default(),
        boot: Boot { kernel: Resource::Descriptor(0), initrd: None, cmdline: image.cmdline.into() },
        console: None,
        disks: Vec::new(),
        nets: Vec::new(),
        rng: None,
        balloon: None,
        vsock: None,
        control: None,
        exit_record: Some(Resource::Descriptor(1)),
        lease: None,
        sandbox: Default::default(),
    }
}

/// Adds a disk and a network device; their descriptors are 2 to 5.
fn plug(config: &mut VmConfig) -> io::Result<Vec<OwnedFd>> {
    let mut plugged = vec![memory_file("disk", DISK_BYTES)?.into()];
    plugged.extend(Region::create()?.descriptors()?);
    let source = DiskSource::Raw(Resource::Descriptor(2));
    config.disks.push(DiskConfig::new("disk", source, "bench"));
    config.nets.push(NetConfig::new("net", "fa:16:3e:00:00:01", 1450, NetBackend::Ring([3, 4, 5])));
    Ok(plugged)
}

fn sample(record: &File, ended_ns: u64) -> Result<Sample, BenchError> {
    let mut json = vec![0; RECORD_BYTES_MAX];
    let len = record.read_at(&mut json, 0)?;
    let record: ExitRecord = serde_json::from_slice(&json[..len])
        .map_err(|error| BenchError::NoMark(format!("exit record: {error}")))?;
    let times = record.timings;
    if times.main_ns == 0 {
        return Err(BenchError::NoMark(format!("{}: {}", record.reason, record.message)));
    }
    let since_spawn = |ns: u64| ns.saturating_sub(times.spawn_ns);
    Ok(Sample {
        launch_ns: since_spawn(times.main_ns),
        exit_ns: since_spawn(ended_ns),
        cpu_ns: record.cpu_ns,
        fork_ns: since_spawn(times.process_ns),
        built_ns: since_spawn(times.run_ns),
        exits: times.exits_to_main,
    })
}
