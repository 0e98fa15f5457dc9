//! What a guest is: the JSON of `trine vmm --config FILE` and of a spawn request.

mod validate;

pub use validate::balloon_target_problem;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A host resource: by path in the standalone form (opened before the sandbox closes), by
/// position among the descriptors of the request otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Resource {
    /// A file or socket path.
    Path(PathBuf),
    /// Index into the descriptors that came with the request.
    Descriptor(usize),
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Configuration version: 1.
    pub version: u32,
    /// The guest's id, for logs and for [`crate::control::Status`].
    pub id: String,
    /// Boot nonce: whoever adopts a running guest compares it. Empty where nobody does.
    #[serde(default)]
    pub nonce: String,
    /// vCPUs, at least 1.
    #[serde(default = "one")]
    pub vcpus: u8,
    /// Guest memory, MiB, at least 16.
    pub memory_mib: u32,
    /// Whether memory is in huge pages.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// What runs.
    pub boot: Boot,
    /// Where console output goes; absent: standard output (standalone) or nowhere.
    #[serde(default)]
    pub console: Option<Console>,
    /// Block devices in slot order.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices in slot order, after the disks.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Random numbers from the host; absent: no such device.
    #[serde(default)]
    pub rng: Option<RngConfig>,
    /// A balloon, by which the guest gives memory back; absent: no such device.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Streams between programs on the host and in the guest; absent: no such device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Control socket: a listening Unix stream socket (or the path to bind one at).
    #[serde(default)]
    pub control: Option<Resource>,
    /// The exit record is written here (created empty by the caller, or the path to create):
    /// [`crate::control::ExitRecord`] as JSON.
    #[serde(default)]
    pub exit_record: Option<Resource>,
    /// The host's lease (`abi::lease`), read-only: disks change only while it runs. Absent: always.
    #[serde(default)]
    pub lease: Option<Resource>,
    /// The sandbox; the default is everything the caller's privilege allows.
    #[serde(default)]
    pub sandbox: Sandbox,
}

fn one() -> u8 {
    1
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// The kernel: a unikernel ELF (see `abi::boot`), a Linux `bzImage`, or a Linux `vmlinux` with
    /// a PVH entry. The file itself says which.
    pub kernel: Resource,
    /// Linux's first file system.
    #[serde(default)]
    pub initrd: Option<Resource>,
    /// Its command line.
    #[serde(default)]
    pub cmdline: String,
}

/// Pages of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// As the host's kernel does by itself.
    #[default]
    Off,
    /// Huge where the host's kernel finds them (`MADV_HUGEPAGE`).
    Transparent,
    /// 2 MiB pages that the host's administrator reserved (`vm.nr_hugepages`), all taken at start.
    Reserved,
}

/// Console output: a ring file that keeps the last `capacity_bytes`.
///
/// The file is [`CONSOLE_HEADER_BYTES`] of header (`CONSOLE_MAGIC`, then the count of all bytes
/// ever written, both little-endian `u64`), then the ring: byte `n` lies at `n % capacity`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// The file.
    pub file: Resource,
    /// Size of its ring.
    #[serde(default = "console_capacity")]
    pub capacity_bytes: u64,
}

fn console_capacity() -> u64 {
    1 << 20
}

/// Header of a console file.
pub const CONSOLE_HEADER_BYTES: u64 = 16;
/// First 8 bytes of a console file.
pub const CONSOLE_MAGIC: u64 = u64::from_le_bytes(*b"TRINECON");

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name for control requests, unique in the guest.
    pub id: String,
    /// Where its bytes are.
    pub source: DiskSource,
    /// Refuse writes (VIRTIO_BLK_F_RO).
    #[serde(default)]
    pub read_only: bool,
    /// Serial number (VIRTIO_BLK_T_GET_ID), at most 20 bytes are shown to the guest.
    #[serde(default)]
    pub serial: String,
    /// Queues (VIRTIO_BLK_F_MQ), 1 to 16; as many as the guest has vCPUs is of use.
    #[serde(default = "one_queue")]
    pub queues: u16,
    /// How a raw file is read and written.
    #[serde(default)]
    pub engine: DiskEngine,
    /// How much the guest may ask of it a second.
    #[serde(default)]
    pub limits: RateLimits,
}

/// Rate limits; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Requests of a disk, frames of a network device.
    #[serde(default)]
    pub operations: Option<TokenBucket>,
    /// Bytes of data.
    #[serde(default)]
    pub bytes: Option<TokenBucket>,
}

/// One rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// So many a second, at least 1.
    pub per_second: u64,
    /// So many at once after a pause, at least 1; absent: those of a second.
    #[serde(default)]
    pub burst: Option<u64>,
}

impl DiskConfig {
    /// A writable disk with one queue, everything else as the host does best.
    pub fn new(id: &str, source: DiskSource, serial: &str) -> DiskConfig {
        DiskConfig {
            id: id.into(),
            source,
            read_only: false,
            serial: serial.into(),
            queues: one_queue(),
            engine: DiskEngine::default(),
            limits: RateLimits::default(),
        }
    }
}

fn one_queue() -> u16 {
    1
}

/// How a raw file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskEngine {
    /// By io_uring where the host has it and the disk is there at the start, else as `thread`.
    #[default]
    Auto,
    /// By io_uring, or the guest does not start.
    IoUring,
    /// By plain system calls of the device's thread.
    Thread,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskSource {
    /// A raw file or block device; its size is the disk's.
    Raw(Resource),
    /// A connected Unix stream socket whose server is past the NBD handshake and in the
    /// transmission phase with simple replies (structured ones not negotiated), for an export of
    /// `size_bytes`.
    Nbd {
        /// The socket.
        socket: Resource,
        /// The export's size.
        size_bytes: u64,
        /// The server's epoch: another one, at a later connection, means that the server may have
        /// lost what it answered and was not asked to flush.
        #[serde(default)]
        epoch: u64,
    },
}

/// A virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name for control requests, unique in the guest.
    pub id: String,
    /// MAC address, `fa:16:3e:xx:xx:xx`.
    pub mac: String,
    /// MTU told to the guest (VIRTIO_NET_F_MTU), 68 to 1946.
    #[serde(default = "mtu")]
    pub mtu: u16,
    /// Where its frames go.
    pub backend: NetBackend,
    /// How much the guest may send a second.
    #[serde(default)]
    pub from_guest: RateLimits,
    /// How much the guest is given a second; more than that waits in the backend.
    #[serde(default)]
    pub to_guest: RateLimits,
}

impl NetConfig {
    /// A network device without limits.
    pub fn new(id: &str, mac: &str, mtu: u16, backend: NetBackend) -> NetConfig {
        NetConfig {
            id: id.into(),
            mac: mac.into(),
            mtu,
            backend,
            from_guest: RateLimits::default(),
            to_guest: RateLimits::default(),
        }
    }
}

fn mtu() -> u16 {
    1500
}

/// Where a network device's frames go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NetBackend {
    /// A packet ring to the switch (`abi::packet_ring`): memory, from-guest and to-guest eventfd.
    Ring([usize; 3]),
    /// A TAP interface by name (standalone only), or its descriptor.
    Tap(Resource),
}

/// A virtio-rng device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Most bytes it gives a second, at least 1.
    #[serde(default = "rng_rate")]
    pub bytes_per_second: u64,
}

fn rng_rate() -> u64 {
    1 << 20
}

/// A virtio-balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory the guest is asked to give back from the start, MiB.
    #[serde(default)]
    pub target_mib: u32,
    /// The guest may take it back when it has no other memory.
    #[serde(default = "yes")]
    pub deflate_on_oom: bool,
    /// The guest reports memory that happens to be free, and the host takes it.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
}

/// A virtio-vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, at least 3.
    pub cid: u32,
    /// A listening Unix stream socket (or the path to bind one at): programs on the host connect to
    /// it and write `CONNECT PORT\n`. With a path, the guest's connections to port `P` of the host
    /// go to the Unix socket `PATH_P`.
    pub socket: Resource,
    /// With descriptors: the inside end of [`crate::devices::vsock::connector::pair`], by which the
    /// guest's connections are asked for. Absent: they are refused.
    #[serde(default)]
    pub connector: Option<usize>,
}

fn yes() -> bool {
    true
}

/// How tightly the process is closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// As root: the uid and gid this guest's process takes; absent: the caller's.
    #[serde(default)]
    pub uid: Option<u32>,
    /// As root: cgroup directories (v1 or v2) whose `cgroup.procs` the process enters.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
}
