//! Commands on the image catalog. An update's `None` leaves the field as it is.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{ImageContent, Visibility};
use crate::ids::{HostId, ImageId, ProjectId};

/// A command on images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ImageCommand {
    /// Makes an image without content.
    Create(Box<NewImage>),
    /// Changes what is known of it.
    Update(Box<ImageUpdate>),
    /// Removes it.
    Delete(ImageId),
    /// Its content is coming: queued → saving.
    UploadStarted(ImageId),
    /// Its content is there, durably, on one host: saving → active.
    Uploaded {
        /// Which.
        id: ImageId,
        /// What it turned out to be.
        content: ImageContent,
        /// Who holds it.
        host: HostId,
        /// Which upload; of a program before feature level 2 when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        upload: Option<u64>,
    },
    /// Its content is coming to this host: queued → saving. The outcome's `upload` names it.
    UploadBegun {
        /// Which.
        id: ImageId,
        /// Who takes it.
        host: HostId,
    },
    /// An upload failed, or died with its host: saving → queued.
    UploadEnded {
        /// Which.
        id: ImageId,
        /// Which upload.
        upload: u64,
    },
    /// Its content did not arrive: saving → queued.
    UploadFailed(ImageId),
    /// One more host holds the content.
    HeldBy {
        /// Which.
        id: ImageId,
        /// Who.
        host: HostId,
    },
}

/// An image to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewImage {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: Option<String>,
    /// The project it belongs to.
    pub owner: Option<ProjectId>,
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
}

/// A change of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageUpdate {
    /// Which.
    pub id: ImageId,
    /// New name.
    pub name: Option<Option<String>>,
    /// New disk format (only while queued).
    pub disk_format: Option<String>,
    /// New container format (only while queued).
    pub container_format: Option<String>,
    /// New visibility.
    pub visibility: Option<Visibility>,
    /// Protect or not.
    pub protected: Option<bool>,
    /// Hide or not.
    pub hidden: Option<bool>,
    /// New smallest root disk.
    pub min_disk: Option<u64>,
    /// New smallest memory.
    pub min_ram: Option<u64>,
    /// New tags.
    pub tags: Option<BTreeSet<String>>,
    /// New properties, replacing all.
    pub properties: Option<BTreeMap<String, String>>,
}

impl ImageUpdate {
    /// A change of nothing.
    pub fn of(id: ImageId) -> Self {
        Self {
            id,
            name: None,
            disk_format: None,
            container_format: None,
            visibility: None,
            protected: None,
            hidden: None,
            min_disk: None,
            min_ram: None,
            tags: None,
            properties: None,
        }
    }
}
