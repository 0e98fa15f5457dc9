//! What the API needs of the node it runs in: the replicated state, a way to propose
//! commands, and the bytes and consoles that live on hosts.

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use thiserror::Error;

use crate::ids::{HostId, ServerId};
use crate::plan::Liveness;
use crate::seal::Sealer;
use crate::state::compute::Server;
use crate::state::image::{Image, ImageContent};
use crate::state::{Command, Outcome, Rejection, State};

/// A body that arrives in pieces; never held whole in memory.
pub type BodyStream = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// The node can't serve now: no quorum, no leader, still starting.
#[derive(Debug, Clone, Error)]
#[error("the cluster can't answer now: {0}")]
pub struct Unavailable(pub String);

/// Why a command was not carried out.
#[derive(Debug, Clone, Error)]
pub enum ProposeError {
    /// The state machine said no; nothing changed.
    #[error("{0}")]
    Rejected(Rejection),
    /// Whether it was carried out is not known; the same command id may be tried again.
    #[error("the cluster can't take the command now: {0}")]
    Unavailable(String),
    /// The disks of the cluster's log are full; it was not carried out.
    #[error("the disks are full, so nothing can be changed; free space on them: {0}")]
    NoSpace(String),
}

/// Why something that happens on a host could not be done.
#[derive(Debug, Clone, Error)]
pub enum CloudError {
    /// There is nothing like that (yet): no console output, no content.
    #[error("{0}")]
    NotFound(String),
    /// What the client sent can't be used.
    #[error("{0}")]
    Invalid(String),
    /// There is no room for it.
    #[error("{0}")]
    NoSpace(String),
    /// It is being done already, or its state forbids it.
    #[error("{0}")]
    Conflict(String),
    /// The host that would do it can't be reached.
    #[error("{0}")]
    Unavailable(String),
    /// It failed.
    #[error("{0}")]
    Failed(String),
}

/// What became of an upload.
#[derive(Debug, Clone)]
pub struct UploadedImage {
    /// What it turned out to be.
    pub content: ImageContent,
    /// Which host holds it, durably.
    pub host: HostId,
}

/// How far the making of a server has come; known to its host alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubState {
    /// Its ports are being set up.
    Networking,
    /// Its disks are being made.
    BlockDeviceMapping,
    /// Its VMM is being started.
    Spawning,
}

impl SubState {
    /// Nova's `task_state`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Networking => "networking",
            Self::BlockDeviceMapping => "block_device_mapping",
            Self::Spawning => "spawning",
        }
    }
}

/// The keys that tokens are made with: the first makes, all of them verify.
#[derive(Clone)]
pub struct TokenKeys {
    /// At least one key.
    pub keys: Vec<[u8; 32]>,
}

impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenKeys({} keys)", self.keys.len())
    }
}

/// The node behind the API.
#[async_trait]
pub trait Cloud: Send + Sync + 'static {
    /// A linearizable view of the replicated state, cheap to clone.
    async fn read(&self) -> Result<State, Unavailable>;

    /// Carries out a command through the log. The same `command_id` again returns the
    /// stored outcome.
    async fn propose(
        &self,
        command_id: [u8; 16],
        command: Command,
    ) -> Result<Outcome, ProposeError>;

    /// The last `lines` lines that the guest wrote to its console, all that is kept when
    /// `None`.
    async fn console_output(
        &self,
        server: &Server,
        lines: Option<usize>,
    ) -> Result<String, CloudError>;

    /// Stores an image's content durably on some host.
    async fn upload_image(
        &self,
        image: &Image,
        body: BodyStream,
    ) -> Result<UploadedImage, CloudError>;

    /// An image's content, from a host that holds it.
    async fn download_image(&self, image: &Image) -> Result<BodyStream, CloudError>;

    /// How far the making of a server has come.
    async fn volatile(&self, server: &ServerId) -> Option<SubState>;

    /// The host of this node.
    fn host(&self) -> HostId;

    /// Which hosts are up.
    fn liveness(&self) -> Liveness;

    /// The time, in milliseconds since 1970.
    fn now_ms(&self) -> u64;

    /// Seals what the log must not show.
    fn sealer(&self) -> &Sealer;

    /// The keys of tokens.
    fn token_keys(&self) -> TokenKeys;
}
