//! Changes of the image catalog.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Image, ImageCommand, ImageContent, ImageStatus, ImageUpdate, NewImage};
use crate::ids::{HostId, ImageId};
use crate::state::State;
use crate::state::identity::set;
use crate::state::limits::{IMAGES_MAX, METADATA_MAX, TAGS_MAX, room};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};

impl State {
    pub(in crate::state) fn apply_image(
        &mut self,
        command: &ImageCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            ImageCommand::Create(new) => self.create_image(new),
            ImageCommand::Update(update) => self.update_image(update),
            ImageCommand::Delete(id) => self.delete_image(id),
            ImageCommand::UploadStarted(id) => {
                self.move_image(id, ImageStatus::Queued, ImageStatus::Saving)
            }
            ImageCommand::UploadBegun { id, host } => self.begin_upload(id, *host),
            ImageCommand::UploadEnded { id, upload } => {
                let current = self.image.images.get(id).is_some_and(|image| {
                    image.status == ImageStatus::Saving && image.upload == *upload
                });
                if !current {
                    return Ok(Outcome::Ignored);
                }
                self.move_image(id, ImageStatus::Saving, ImageStatus::Queued)
            }
            ImageCommand::Uploaded { id, content, host, upload } => {
                let known = self.image.images.get(id).map(|image| image.upload);
                if upload.is_some() && known.is_some() && *upload != known {
                    let message = format!("This upload of image {id} was given up before.");
                    return Err(Rejection::conflict("image", id, message));
                }
                self.uploaded(id, content, *host)
            }
            ImageCommand::UploadFailed(id) => {
                if self.image.images.get(id).is_none_or(|i| i.status != ImageStatus::Saving) {
                    return Ok(Outcome::Ignored);
                }
                self.move_image(id, ImageStatus::Saving, ImageStatus::Queued)
            }
            ImageCommand::HeldBy { id, host } => {
                let held = self.image.images.get(id).is_some_and(|i| i.hosts.contains(host));
                if held || !self.image.images.contains_key(id) {
                    return Ok(Outcome::Ignored);
                }
                if !self.cluster.hosts.contains_key(host) {
                    return Err(Rejection::not_found("host", host));
                }
                let image = self.image_mut(id)?;
                image.hosts.insert(*host);
                Ok(Outcome::Done)
            }
        }
    }

    fn image_mut(&mut self, id: &ImageId) -> Result<&mut Image, Rejection> {
        let image = self.image.images.get_mut(id);
        image.map(Arc::make_mut).ok_or_else(|| Rejection::not_found("image", id))
    }

    fn create_image(&mut self, new: &NewImage) -> Result<Outcome, Rejection> {
        room(self.image.images.len(), IMAGES_MAX, "image")?;
        if self.image.images.contains_key(&new.id) {
            let message = format!("Image ID {} already exists!", new.id);
            return Err(Rejection::conflict("image", &new.id, message));
        }
        self.room_within(new.properties.len(), METADATA_MAX, "image property")?;
        self.room_within(new.tags.len(), TAGS_MAX, "tag")?;
        let image = Image {
            id: new.id.clone(),
            name: new.name.clone(),
            owner: new.owner.clone(),
            status: ImageStatus::Queued,
            disk_format: new.disk_format.clone(),
            container_format: new.container_format.clone(),
            visibility: new.visibility,
            protected: new.protected,
            hidden: new.hidden,
            min_disk: new.min_disk,
            min_ram: new.min_ram,
            tags: new.tags.clone(),
            properties: new.properties.clone(),
            content: None,
            hosts: BTreeSet::new(),
            upload: 0,
            uploader: None,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.image.images.insert(image.id.clone(), Arc::new(image.clone()));
        Ok(Outcome::Image(Box::new(image)))
    }

    fn update_image(&mut self, update: &ImageUpdate) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let properties = update.properties.as_ref().map_or(0, |properties| properties.len());
        self.room_within(properties, METADATA_MAX, "image property")?;
        self.room_within(update.tags.as_ref().map_or(0, |tags| tags.len()), TAGS_MAX, "tag")?;
        let image = self.image_mut(&update.id)?;
        let reformats = update.disk_format.is_some() || update.container_format.is_some();
        if reformats && image.status != ImageStatus::Queued {
            let message = "Attribute container_format can be only replaced for a queued image.";
            return Err(Rejection::new(RejectionKind::Forbidden, "image", &update.id, message));
        }
        set(&mut image.name, &update.name);
        set(&mut image.visibility, &update.visibility);
        set(&mut image.protected, &update.protected);
        set(&mut image.hidden, &update.hidden);
        set(&mut image.min_disk, &update.min_disk);
        set(&mut image.min_ram, &update.min_ram);
        set(&mut image.tags, &update.tags);
        set(&mut image.properties, &update.properties);
        if update.disk_format.is_some() {
            image.disk_format.clone_from(&update.disk_format);
        }
        if update.container_format.is_some() {
            image.container_format.clone_from(&update.container_format);
        }
        image.updated_ms = now;
        Ok(Outcome::Image(Box::new(image.clone())))
    }

    /// Removes an image. Servers made from it keep their root disks; one that is still
    /// being made keeps its image here until it runs.
    fn delete_image(&mut self, id: &ImageId) -> Result<Outcome, Rejection> {
        let image = self.image_mut(id)?;
        if image.protected {
            let message = format!("Image {id} is protected and cannot be deleted.");
            return Err(Rejection::new(RejectionKind::Forbidden, "image", id, message));
        }
        if self.image_is_being_used(id) {
            let message = format!(
                "Image {id} could not be deleted because it is in use: a server is being built from it."
            );
            return Err(Rejection::in_use("image", id, message));
        }
        self.image.images.remove(id);
        Ok(Outcome::Done)
    }

    fn move_image(
        &mut self,
        id: &ImageId,
        from: ImageStatus,
        to: ImageStatus,
    ) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let image = self.image_mut(id)?;
        if image.status != from {
            return Err(wrong_status(id, image.status, to));
        }
        if image.disk_format.is_none() || image.container_format.is_none() {
            let message =
                "Properties disk_format, container_format must be set prior to saving data.";
            return Err(Rejection::invalid("image", id, message));
        }
        image.status = to;
        image.updated_ms = now;
        Ok(Outcome::Image(Box::new(image.clone())))
    }

    fn begin_upload(&mut self, id: &ImageId, host: HostId) -> Result<Outcome, Rejection> {
        if !self.cluster.hosts.contains_key(&host) {
            return Err(Rejection::not_found("host", host));
        }
        self.move_image(id, ImageStatus::Queued, ImageStatus::Saving)?;
        let image = self.image_mut(id)?;
        image.upload += 1;
        image.uploader = Some(host);
        Ok(Outcome::Image(Box::new(image.clone())))
    }

    fn uploaded(
        &mut self,
        id: &ImageId,
        content: &ImageContent,
        host: HostId,
    ) -> Result<Outcome, Rejection> {
        if !self.cluster.hosts.contains_key(&host) {
            return Err(Rejection::not_found("host", host));
        }
        let now = self.time_ms;
        let image = self.image_mut(id)?;
        if image.status != ImageStatus::Saving {
            return Err(wrong_status(id, image.status, ImageStatus::Active));
        }
        image.status = ImageStatus::Active;
        image.content = Some(content.clone());
        image.hosts = BTreeSet::from([host]);
        image.updated_ms = now;
        Ok(Outcome::Image(Box::new(image.clone())))
    }
}

fn wrong_status(id: &ImageId, from: ImageStatus, to: ImageStatus) -> Rejection {
    let message =
        format!("Image status transition from {} to {} is not allowed", from.as_str(), to.as_str());
    Rejection::conflict("image", id, message)
}
