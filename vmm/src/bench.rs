//! One launch, measured: what `trine bench launch` repeats for `floor`, `cold/no-devices` and
//! `cold/devices`.
//!
//! All three are forked by the same spawner in the same way, and t0 is its clock just before the
//! fork. The end is the guest's first port write: for the floor seen by the program itself, for
//! the others the write of `MARK_MAIN`.

use crate::config::{Boot, DiskConfig, DiskSource, NetBackend, NetConfig, Resource, VmConfig};
use crate::control::ExitRecord;
use crate::spawner::{Client, SpawnError};
use abi::packet_ring::Region;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
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
    })
}

/// Launches `kernel` once; it must end by itself soon after its mark ([`crate::probe::image`], or
/// the built-in guest with `exit-after-main` on its command line).
pub fn launch(
    spawner: &Client,
    kernel: &File,
    cmdline: &str,
    memory_mib: u32,
    devices: Devices,
) -> Result<Sample, BenchError> {
    let record =
        File::from(memfd_create("exit-record", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    let mut config = VmConfig {
        version: 1,
        id: "bench".into(),
        nonce: String::new(),
        vcpus: 1,
        memory_mib,
        huge_pages: Default::default(),
        boot: Boot { kernel: Resource::Descriptor(0), initrd: None, cmdline: cmdline.into() },
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
    };
    let mut plugged: Vec<std::os::fd::OwnedFd> = Vec::new();
    if devices == Devices::BlockAndNet {
        let disk = memfd_create("disk", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&disk, DISK_BYTES).map_err(io::Error::from)?;
        plugged.push(disk);
        plugged.extend(Region::create()?.descriptors()?);
        config.disks.push(DiskConfig {
            id: "disk".into(),
            source: DiskSource::Raw(Resource::Descriptor(2)),
            read_only: false,
            serial: "bench".into(),
        });
        config.nets.push(NetConfig {
            id: "net".into(),
            mac: "fa:16:3e:00:00:01".into(),
            mtu: 1450,
            backend: NetBackend::Ring([3, 4, 5]),
        });
    }
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![kernel.as_fd(), record.as_fd()];
    descriptors.extend(plugged.iter().map(AsFd::as_fd));
    let guest = spawner.spawn(&config, &descriptors)?;
    poll(&mut [PollFd::new(&guest.pidfd, PollFlags::IN)], None).map_err(io::Error::from)?;
    let ended_ns = crate::process::timings::now_ns();
    sample(&record, ended_ns)
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
    })
}
