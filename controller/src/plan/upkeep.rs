//! What nobody reports any more because who would is gone: the leader gives it up.

use crate::ids::HostId;
use crate::state::cluster::Host;
use crate::state::image::{Image, ImageCommand, ImageStatus};
use crate::state::volume::{DETACH_MS_MAX, VolumeCommand, VolumeStatus};
use crate::state::{Command, State};

/// An upload that takes longer than this is given up.
pub const UPLOAD_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// The most commands of one round.
pub const UPKEEP_COMMANDS_MAX: usize = 64;

/// What the leader has to give up: uploads whose host is out or that last too long, volumes that
/// a host was making when it failed. Nothing where all is well.
pub fn upkeep(state: &State, now_ms: u64) -> Vec<Command> {
    let out = |host: HostId| state.cluster.hosts.get(&host).is_none_or(Host::is_out);
    let uploads = state.image.images.values().filter(|image| {
        let late = now_ms.saturating_sub(image.updated_ms) > UPLOAD_MS_MAX;
        image.status == ImageStatus::Saving && (late || image.uploader.is_some_and(out))
    });
    let uploads = uploads.map(|image| end_upload(image));
    let volumes =
        state.volume.volumes.values().filter(|volume| {
            volume.status == VolumeStatus::Creating && volume.home.is_some_and(out)
        });
    let volumes = volumes.map(|volume| {
        let reason = "The host that was making the volume is out of service.".to_owned();
        Command::Volume(VolumeCommand::Failed { id: volume.id.clone(), reason })
    });
    uploads.chain(volumes).chain(detachments(state, now_ms)).take(UPKEEP_COMMANDS_MAX).collect()
}

/// Detachments that took too long: their guests don't let go.
fn detachments(state: &State, now_ms: u64) -> impl Iterator<Item = Command> {
    state.volume.volumes.values().filter_map(move |volume| {
        let attachment = volume.attachments.first()?;
        let asked_ms = attachment.detaching_ms?;
        // By the leader's clock and by the time that it stamps, which may be ahead of it.
        let over = now_ms.max(state.time_ms).saturating_sub(asked_ms) >= DETACH_MS_MAX;
        over.then(|| {
            let (volume_id, generation) = (volume.id.clone(), attachment.generation);
            Command::Volume(VolumeCommand::DetachExpired { volume_id, generation, asked_ms })
        })
    })
}

/// The uploads that a host took when its node last ended: to be ended when the node starts,
/// before its API serves, from a state that is as new as the start.
pub fn interrupted_uploads(state: &State, host: HostId) -> Vec<Command> {
    let images = state.image.images.values();
    let mine = images.filter(|i| i.status == ImageStatus::Saving && i.uploader == Some(host));
    mine.map(|image| end_upload(image)).collect()
}

fn end_upload(image: &Image) -> Command {
    let id = image.id.clone();
    Command::Image(match image.uploader {
        Some(_) => ImageCommand::UploadEnded { id, upload: image.upload },
        // Begun by a program before feature level 2.
        None => ImageCommand::UploadFailed(id),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ImageId;
    use crate::state::cluster::ClusterCommand;
    use crate::state::fixture::{Sample, content, new_image, new_volume};
    use crate::state::{Outcome, RejectionKind};

    const NOW: u64 = 1_000_000;

    fn saving(uploader: Option<u64>) -> Sample {
        let mut sample = Sample::new();
        sample.must(Command::Image(ImageCommand::Create(Box::new(new_image("i")))));
        sample.must(Command::Image(match uploader {
            Some(host) => ImageCommand::UploadBegun { id: "i".into(), host: HostId(host) },
            None => ImageCommand::UploadStarted("i".into()),
        }));
        sample
    }

    fn status(sample: &Sample) -> ImageStatus {
        sample.state.image.images[&ImageId::from("i")].status
    }

    fn fence(id: u64) -> Command {
        Command::Cluster(ClusterCommand::FenceHost { id: HostId(id), epoch: 1 })
    }

    fn give_up(sample: &mut Sample, now_ms: u64) -> usize {
        let commands = upkeep(&sample.state, now_ms);
        let count = commands.len();
        commands.into_iter().for_each(|command| drop(sample.must(command)));
        count
    }

    #[test]
    fn an_upload_that_lost_its_host_or_lasts_too_long_is_given_up() {
        for uploader in [Some(2), None] {
            let mut sample = saving(uploader);
            assert_eq!(give_up(&mut sample, NOW), 0);
            assert_eq!(give_up(&mut sample, NOW + UPLOAD_MS_MAX), 1);
            assert_eq!(status(&sample), ImageStatus::Queued);
        }
        let mut sample = saving(Some(2));
        sample.must(fence(2));
        assert_eq!(give_up(&mut sample, NOW), 1);
        assert_eq!((status(&sample), give_up(&mut sample, NOW)), (ImageStatus::Queued, 0));
    }

    #[test]
    fn a_node_that_starts_ends_the_uploads_it_had_begun_and_no_others() {
        let sample = saving(Some(2));
        assert_eq!(interrupted_uploads(&sample.state, HostId(1)), []);
        assert_eq!(interrupted_uploads(&sample.state, HostId(2)).len(), 1);
    }

    #[test]
    fn what_an_upload_reports_that_was_given_up_does_not_count_for_the_next() {
        let mut sample = saving(Some(2));
        sample.must(Command::Image(ImageCommand::UploadEnded { id: "i".into(), upload: 1 }));
        let begun = ImageCommand::UploadBegun { id: "i".into(), host: HostId(1) };
        sample.must(Command::Image(begun));
        let uploaded = |upload| {
            Command::Image(ImageCommand::Uploaded {
                id: "i".into(),
                content: content(),
                host: HostId(1),
                upload: Some(upload),
            })
        };
        sample.refused_as(uploaded(1), RejectionKind::Conflict);
        let late = ImageCommand::UploadEnded { id: "i".into(), upload: 1 };
        assert_eq!(sample.must(Command::Image(late)), Outcome::Ignored);
        sample.must(uploaded(2));
        assert_eq!(status(&sample), ImageStatus::Active);
    }

    #[test]
    fn a_volume_that_a_failed_host_was_making_is_in_error() {
        let mut sample = Sample::new();
        let new = Box::new(new_volume("v", 1));
        sample.volume(VolumeCommand::Create(new));
        let home = sample.volume_of("v").home.expect("it has one");
        assert_eq!(give_up(&mut sample, NOW), 0);
        sample.must(fence(home.0));
        assert_eq!(give_up(&mut sample, NOW), 1);
        assert_eq!(sample.volume_of("v").status, VolumeStatus::Error);
    }
}
