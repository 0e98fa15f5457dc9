//! A host that leaves for good, and what becomes of what it held.

use std::sync::Arc;

use crate::ids::{HostId, ImageId, ServerId, VolumeId};
use crate::state::State;
use crate::state::cluster::Host;
use crate::state::compute::{Desired, Fault, Server};
use crate::state::image::ImageStatus;
use crate::state::outcome::{Outcome, Rejection};

impl State {
    pub(super) fn remove_host(&mut self, id: HostId, force: bool) -> Result<Outcome, Rejection> {
        let host = self.host_mut(id)?.clone();
        if self.cluster.hosts.len() == 1 {
            let message = format!("Host {} is the cluster's only one.", host.name);
            return Err(Rejection::conflict("host", id, message));
        }
        let images = self.images_only_on(id);
        if let Some(loss) = self.loss_with(&host, &images).filter(|_| !force) {
            return Err(Rejection::in_use("host", id, loss));
        }
        let placed = self.compute.placed.get(&id).map(|placed| placed.servers.clone());
        let homed = self.volume.homed.get(&id).map(|homed| homed.volumes.clone());
        for server in placed.into_iter().flatten() {
            self.lose_server(&server, &host);
        }
        for volume in homed.into_iter().flatten() {
            self.lose_home(&volume, &host);
        }
        self.forget_copies(id, &images);
        let used = self.cluster.join_tokens.iter().filter(|(_, token)| token.used_by == Some(id));
        let used: Vec<String> = used.map(|(hash, _)| hash.clone()).collect();
        for hash in used {
            self.cluster.join_tokens.remove(&hash);
        }
        self.cluster.hosts.remove(&id);
        Ok(Outcome::Done)
    }

    /// What the cloud loses with a host, in words; `None` when nothing.
    fn loss_with(&self, host: &Host, images: &[ImageId]) -> Option<String> {
        let servers = self.compute.placed.get(&host.id).map_or(0, |placed| placed.servers.len());
        let volumes = self.volume.homed.get(&host.id).map_or(0, |homed| homed.volumes.len());
        if servers + volumes + images.len() == 0 {
            return None;
        }
        let copies = images.len();
        Some(format!(
            "Host {} still has {servers} servers, {volumes} volumes and the only copy of {copies} images. Evacuate or delete them, or force the removal and lose them.",
            host.name
        ))
    }

    /// Images whose content no other host holds.
    fn images_only_on(&self, host: HostId) -> Vec<ImageId> {
        let images = self.image.images.values();
        let only = images.filter(|image| image.hosts.len() == 1 && image.hosts.contains(&host));
        only.map(|image| image.id.clone()).collect()
    }

    fn lose_server(&mut self, id: &ServerId, host: &Host) {
        let deleted = |server: &Arc<Server>| server.desired == Desired::Deleted;
        if self.compute.servers.get(id).is_none_or(deleted) {
            self.remove_server(id);
            return;
        }
        let fault = Fault {
            code: 500,
            message: format!("Host {} was removed from the cloud with this server.", host.name),
            details: format!("Host {} ({}) was removed by force.", host.name, host.id),
            created_ms: self.time_ms,
        };
        self.strand_server(id, fault);
    }

    fn lose_home(&mut self, id: &VolumeId, host: &Host) {
        let fault = format!("Host {} was removed from the cloud with this volume.", host.name);
        self.strand_volume(id, fault);
    }

    fn forget_copies(&mut self, host: HostId, lost: &[ImageId]) {
        let held: Vec<ImageId> = self
            .image
            .images
            .values()
            .filter(|image| image.hosts.contains(&host))
            .map(|image| image.id.clone())
            .collect();
        for id in held {
            let Some(image) = self.image.images.get_mut(&id).map(Arc::make_mut) else { continue };
            image.hosts.remove(&host);
        }
        for id in lost {
            let Some(image) = self.image.images.get_mut(id).map(Arc::make_mut) else { continue };
            image.status = ImageStatus::Queued;
            image.content = None;
            image.updated_ms = self.time_ms;
        }
    }
}
