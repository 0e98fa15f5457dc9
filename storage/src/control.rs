//! What a storage process is asked over its control socket, and what it answers: JSON in the
//! frames of [`abi::control`], one reply for each request, in order. Descriptors travel with the
//! frame that needs them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The protocol's version; a process refuses every other.
pub const VERSION: u32 = 1;
/// Longest id of a volume, a server or an image.
pub const ID_BYTES_MAX: usize = 64;
/// Most peers that one fetch may name.
pub const PEERS_MAX: usize = 64;
/// Most files on one config drive.
pub const CONFIG_FILES_MAX: usize = 64;
/// Most content on one config drive, bytes.
pub const CONFIG_BYTES_MAX: usize = 16 << 20;
/// Largest volume or instance disk, bytes.
pub const DISK_BYTES_MAX: u64 = 64 << 40;

/// One request with the version it is written in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`].
    pub version: u32,
    /// The request.
    pub request: Request,
}

/// Where another host's storage process listens, and the name its certificate must carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its NBD address.
    pub address: SocketAddr,
    /// `node-<id>.<cluster id>.trine`.
    pub server_name: String,
}

/// One attachment of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The volume.
    pub volume_id: String,
    /// The server that may use it.
    pub server_id: String,
    /// The attachment's generation: the volume's gate refuses every older one.
    pub generation: u64,
    /// Whether the server may only read.
    #[serde(default)]
    pub read_only: bool,
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What this process holds → [`Reply::Status`].
    Status,
    /// Stores the bytes read from the descriptor that comes with the frame (to its end) →
    /// [`Reply::Imported`].
    ImportImage {
        /// The catalog's id, for messages only: content is kept by its hash.
        image_id: String,
        /// Glance's `disk_format`; only those stored as they are: raw, aki, ari, ami, iso.
        disk_format: String,
        /// More than this is refused.
        size_limit_bytes: u64,
    },
    /// Brings an image from another host and verifies it → [`Reply::Done`], also when held.
    FetchImage {
        /// The content's SHA-512 in hex.
        sha512: String,
        /// Its length.
        size_bytes: u64,
        /// Hosts that hold it, tried in this order.
        from: Vec<Peer>,
    },
    /// → [`Reply::Held`].
    HasImage {
        /// The content's SHA-512 in hex.
        sha512: String,
    },
    /// Removes an image; one that is not held is no error → [`Reply::Done`].
    DeleteImage {
        /// The content's SHA-512 in hex.
        sha512: String,
    },
    /// → [`Reply::Disk`] with a read-only descriptor of the content.
    ReadImage {
        /// The content's SHA-512 in hex.
        sha512: String,
    },
    /// Makes an instance disk from an image, grown to a size → [`Reply::Done`], also when made.
    CreateRoot {
        /// The server.
        server_id: String,
        /// The image's SHA-512 in hex.
        sha512: String,
        /// The disk's size, at least the image's.
        size_bytes: u64,
    },
    /// → [`Reply::Disk`] with a read-write descriptor.
    OpenRoot {
        /// The server.
        server_id: String,
    },
    /// Removes a server's disk and config drive, if any → [`Reply::Done`].
    DeleteRoot {
        /// The server.
        server_id: String,
    },
    /// Writes a server's config drive (ISO 9660, label `config-2`), replacing an older one →
    /// [`Reply::Disk`] with a read-only descriptor.
    WriteConfigDrive {
        /// The server.
        server_id: String,
        /// Content in base64 by path, such as `openstack/latest/meta_data.json`.
        files: BTreeMap<String, String>,
    },
    /// Makes an empty volume with its home here → [`Reply::Done`], also when made.
    CreateVolume {
        /// The volume.
        volume_id: String,
        /// Its size, a multiple of 512.
        size_bytes: u64,
    },
    /// Removes a volume → [`Reply::Done`], also when there is none. Refused (`in_use`) while a
    /// server holds it, unless `generation` is newer than the holder's.
    DeleteVolume {
        /// The volume.
        volume_id: String,
        /// The generation the deletion is decided at.
        #[serde(default)]
        generation: Option<u64>,
    },
    /// → [`Reply::Volumes`].
    ListVolumes,
    /// Gives a server on this host a volume whose home is here → [`Reply::Disk`] with a raw
    /// descriptor. The grant is on disk before the reply. While any copy of that descriptor is
    /// open anywhere, no other server gets the volume, at no generation.
    AttachVolume(Attachment),
    /// Permits a server on another host to connect to a volume whose home is here →
    /// [`Reply::Disk`] without a descriptor. The grant is on disk before the reply.
    ExportVolume(Attachment),
    /// As `ExportVolume`, and only that host may connect.
    ExportVolumeTo {
        /// The attachment.
        attachment: Attachment,
        /// The name in that host's certificate, `node-<id>.<cluster id>.trine`.
        host: String,
    },
    /// At the home: ends an attachment, closes its connections and waits for what they had in
    /// flight → [`Reply::Done`], also when it had ended before.
    DetachVolume {
        /// The volume.
        volume_id: String,
        /// The server that held it.
        server_id: String,
        /// The generation that ends; a newer attachment stays untouched.
        generation: u64,
    },
    /// At the server's host: connects to a volume whose home is elsewhere → [`Reply::Disk`] with
    /// a Unix stream socket on which NBD is past its handshake, simple replies. An earlier
    /// connection of the same server to the same volume is closed.
    ConnectVolume {
        /// The attachment that the home has been told to export.
        attachment: Attachment,
        /// The size that the volume must have.
        size_bytes: u64,
        /// The volume's home.
        home: Peer,
    },
    /// At the server's host: closes that connection, if any → [`Reply::Done`].
    DisconnectVolume {
        /// The volume.
        volume_id: String,
        /// The server.
        server_id: String,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is so, durably.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::ImportImage`].
    Imported(Box<ImageInfo>),
    /// To [`Request::HasImage`].
    Held {
        /// Whether the image is here, complete and verified.
        held: bool,
    },
    /// To [`Request::ListVolumes`].
    Volumes {
        /// Every volume with its home here, by id.
        volumes: Vec<VolumeInfo>,
    },
    /// A disk, with its descriptor where the request promises one.
    Disk {
        /// Its size.
        size_bytes: u64,
        /// The storage epoch of its home, to [`Request::ConnectVolume`]: another one than at an
        /// earlier connection means that the home's kernel ended meanwhile, and with it what was
        /// written and not flushed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        epoch: Option<u64>,
    },
    /// It was not done, and nothing was changed.
    Error(Error),
}

/// What a storage process holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process id.
    pub pid: u32,
    /// Chosen afresh at each start: connections of an older instance are gone.
    pub instance: String,
    /// Its directory.
    pub directory: String,
    /// Where it listens for other hosts.
    pub listen: SocketAddr,
    /// Space that is left in its directory's file system.
    pub free_bytes: u64,
    /// That file system's size.
    pub total_bytes: u64,
    /// Images held.
    pub images: Vec<ImageInfo>,
    /// Servers that have disks of their own here.
    pub servers: Vec<String>,
    /// Volumes with their home here.
    pub volumes: Vec<VolumeInfo>,
    /// Volumes that can't be served because their records or data are damaged. Their files are
    /// left as they are; deleting such a volume removes them.
    #[serde(default)]
    pub volumes_damaged: Vec<Damaged>,
    /// Volumes of other hosts that are connected for servers here.
    pub connected: Vec<Connected>,
    /// Median time of a 512-byte overwrite and fdatasync there, measured at start.
    pub fdatasync_p50_us: u64,
}

/// A volume that can't be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    /// Its directory's name, which is the volume's id.
    pub id: String,
    /// What is wrong.
    pub message: String,
}

/// A volume of another host that a server here uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connected {
    /// The volume.
    pub volume_id: String,
    /// The server.
    pub server_id: String,
    /// The attachment's generation.
    pub generation: u64,
}

/// What the bytes of an image are, by looking at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// An ELF executable: a unikernel or a PVH kernel.
    Elf,
    /// A Linux kernel with the boot protocol's header.
    Bzimage,
    /// Anything else.
    Disk,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// SHA-512 of the content in hex: the image's name here.
    pub sha512: String,
    /// SHA-256 of the content in hex.
    pub sha256: String,
    /// MD5 of the content in hex: Glance's `checksum`.
    pub md5: String,
    /// Length of the content.
    pub size_bytes: u64,
    /// Size of the disk it describes; for raw content the length.
    pub virtual_size_bytes: u64,
    /// What the content is.
    pub kind: ImageKind,
}

/// How a volume's holder reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// By a raw descriptor on this host.
    Local,
    /// By NBD from another host.
    Export,
}

/// Who holds a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The server.
    pub server_id: String,
    /// How it reaches the volume.
    pub access: Access,
    /// Whether it may only read.
    pub read_only: bool,
    /// The host that an export is for, by its certificate's name: the one that was named with the
    /// grant, or the first that connected. No other host is admitted at this generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its id.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// The newest generation that its gate has seen.
    pub generation: u64,
    /// Who holds it at that generation.
    pub attached: Option<Holder>,
    /// Whether a connection from another host is open.
    pub connected: bool,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What a program decides by.
    pub kind: ErrorKind,
    /// What a person reads: names the thing, the value and the rule.
    pub message: String,
}

/// The kinds of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// There is no such thing here.
    NotFound,
    /// It exists, and is different.
    Exists,
    /// Another server holds it.
    InUse,
    /// The generation is older than one already seen.
    Stale,
    /// The file system is full.
    NoSpace,
    /// The request breaks a rule.
    Invalid,
    /// The operating system refused.
    Io,
    /// Bytes that arrived are not those that were asked for.
    HashMismatch,
    /// The other process did not answer, or answered nonsense.
    Unreachable,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub(crate) fn in_use(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InUse, message)
    }

    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unreachable, message)
    }

    /// An error of the operating system while doing `act`; a full disk has a kind of its own.
    pub(crate) fn io(act: impl std::fmt::Display, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        let full = matches!(
            source.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        );
        let kind = if full { ErrorKind::NoSpace } else { ErrorKind::Io };
        Self::new(kind, format!("{act}: {source}"))
    }
}

/// Refuses an id that could not be a file's name.
pub(crate) fn check_id(what: &str, id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(allowed) {
        return Err(Error::invalid(format!(
            "{what} id {id:?}: must be 1 to {ID_BYTES_MAX} letters, digits, '-' or '_'"
        )));
    }
    Ok(())
}

/// Refuses what is not a SHA-512 in lower-case hex.
pub(crate) fn check_sha512(sha512: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if sha512.len() != 128 || !sha512.bytes().all(allowed) {
        return Err(Error::invalid(format!(
            "sha512 {sha512:?}: must be 128 lower-case hex digits"
        )));
    }
    Ok(())
}

/// Refuses a size that no disk can have here.
pub(crate) fn check_size(what: &str, size_bytes: u64) -> Result<(), Error> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > DISK_BYTES_MAX {
        return Err(Error::invalid(format!(
            "{what} of {size_bytes} bytes: must be a multiple of 512, at most {DISK_BYTES_MAX}"
        )));
    }
    Ok(())
}
