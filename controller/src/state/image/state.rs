//! The image catalog: what exists, and which hosts hold the bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::ids::{HostId, ImageId, ProjectId};

/// The catalog.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Images {
    /// Images.
    pub images: OrdMap<ImageId, Arc<Image>>,
}

/// Where an image is in its life.
///
/// ```text
/// queued → saving → active → (deactivated) → gone
///   ↑        │
///   └────────┘ upload failed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageStatus {
    /// Known, no content yet.
    Queued,
    /// Its content is being uploaded.
    Saving,
    /// It can be used.
    Active,
    /// Its content is withheld.
    Deactivated,
}

impl ImageStatus {
    /// Glance's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Saving => "saving",
            Self::Active => "active",
            Self::Deactivated => "deactivated",
        }
    }
}

/// Who sees an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// Everybody.
    Public,
    /// Everybody who knows the id.
    Community,
    /// Its project and the members it was shared with.
    Shared,
    /// Its project.
    Private,
}

impl Visibility {
    /// Glance's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Community => "community",
            Self::Shared => "shared",
            Self::Private => "private",
        }
    }
}

/// An image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: Option<String>,
    /// The project it belongs to.
    pub owner: Option<ProjectId>,
    /// Where it is in its life.
    pub status: ImageStatus,
    /// `raw`, `qcow2`, `aki` …
    pub disk_format: Option<String>,
    /// `bare` …
    pub container_format: Option<String>,
    /// Who sees it.
    pub visibility: Visibility,
    /// Can't be deleted.
    pub protected: bool,
    /// Hidden from the default list.
    pub hidden: bool,
    /// Smallest root disk, GiB.
    pub min_disk: u64,
    /// Smallest memory, MiB.
    pub min_ram: u64,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Free properties.
    pub properties: BTreeMap<String, String>,
    /// What was uploaded.
    pub content: Option<ImageContent>,
    /// The hosts that hold the content.
    pub hosts: BTreeSet<HostId>,
    /// Counts its uploads: what an older one reports is refused.
    #[serde(default)]
    pub upload: u64,
    /// The host that takes the upload.
    #[serde(default)]
    pub uploader: Option<HostId>,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// What an upload turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageContent {
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The length of the disk that a guest would see.
    pub virtual_size_bytes: u64,
    /// Hex MD5, as Glance promises.
    pub md5: String,
    /// Hex SHA-512: what the content is addressed by.
    pub sha512: String,
    /// What storage found it to be: `elf`, `bzimage`, `disk`.
    pub kind: String,
}
