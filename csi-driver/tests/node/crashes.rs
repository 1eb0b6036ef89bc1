//! What is left of calls that were interrupted, and calls at the same time.

use std::fs;
use std::process::Command;

use petra_volume::pool::Filesystem;
use tonic::Code;

use crate::lab::{How, Lab, MIB, mounts_at, options, write};

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_goes_on_wherever_it_was_interrupted() {
    let Some(mut lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    for step in 0..5 {
        let mut locked = volume.lock().unwrap();
        match step {
            // The directory was made.
            0 => fs::create_dir(lab.file("staging")).unwrap(),
            // Attached, in this way or the other.
            1 | 2 => drop(locked.attach(step == 2).unwrap()),
            // Mounted and not noted.
            3 | 4 => {
                let device = locked.attach(false).unwrap().device;
                let (device, at) = (device.to_str().unwrap(), lab.path("staging"));
                run("mount", &["-t", "ext4", "-o", "noatime", device, &at]);
                if step == 4 {
                    locked.change(|state| state.wanted = Default::default()).unwrap();
                }
            }
            _ => unreachable!(),
        }
        drop(locked);
        lab.restart();
        lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
        assert_eq!(mounts_at(&lab.file("staging")), 1, "{step}");
        let wanted = volume.state().unwrap().wanted;
        assert!(wanted.attached && wanted.mounted_at.is_some(), "{step}");
        write(&lab.file("staging").join("file"), b"text");
        // An unstage that was interrupted after the unmount.
        if step % 2 == 0 {
            run("umount", &[&lab.path("staging")]);
            lab.restart();
        }
        lab.unstage(&id, "staging").await.unwrap();
        assert!(lab.is_clean(), "{step}");
        assert_eq!(volume.state().unwrap().wanted, Default::default());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_goes_on_wherever_it_was_interrupted() {
    let Some(mut lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
    fs::create_dir(lab.file("one")).unwrap();
    lab.restart();
    lab.publish(&id, "one", How::mount(&[]), true).await.unwrap();
    assert_eq!(options(&lab.file("one")).unwrap(), ["ro", "noatime"]);
    // Someone mounted it twice.
    run("mount", &["--bind", &lab.path("staging"), &lab.path("one")]);
    assert_eq!(mounts_at(&lab.file("one")), 2);
    lab.unpublish(&id, "one").await.unwrap();
    assert!(!lab.file("one").exists());
    // Unmounted, and the directory is left.
    fs::create_dir(lab.file("one")).unwrap();
    lab.unpublish(&id, "one").await.unwrap();
    assert!(!lab.file("one").exists());
    // What a pod wrote while nothing was mounted is not ours to delete.
    fs::create_dir(lab.file("one")).unwrap();
    write(&lab.file("one").join("file"), b"text");
    lab.unpublish(&id, "one").await.unwrap();
    assert_eq!(fs::read(lab.file("one").join("file")).unwrap(), b"text");
    // The mount at the staging path was lost, and with it the staging.
    run("umount", &[&lab.path("staging")]);
    let published = lab.publish(&id, "two", How::mount(&[]), false).await;
    assert_eq!(published, Err(Code::FailedPrecondition));
    lab.stage(&id, "staging", How::mount(&[])).await.unwrap();
    lab.publish(&id, "two", How::mount(&[]), false).await.unwrap();
    lab.unpublish(&id, "two").await.unwrap();
    lab.unstage(&id, "staging").await.unwrap();

    lab.stage(&id, "staging", How::block()).await.unwrap();
    write(&lab.file("block"), b"");
    lab.publish(&id, "block", How::block(), false).await.unwrap();
    run("umount", &[&lab.path("block")]);
    lab.unpublish(&id, "block").await.unwrap();
    assert!(!lab.file("block").exists());
    lab.unstage(&id, "staging").await.unwrap();
    assert!(lab.is_clean());
}

/// Calls for one volume at the same time: some are told to come again, and none does harm.
#[tokio::test(flavor = "multi_thread")]
async fn calls_at_the_same_time_converge() {
    let Some(lab) = Lab::new() else { return };
    let volumes: Vec<_> =
        ["a", "b"].map(|name| lab.pool.create(name, 16 * MIB, Filesystem::Ext4)).into();
    let ids: Vec<String> = volumes.iter().map(|volume| lab.id(volume)).collect();
    let settled = |answers: Vec<Result<(), Code>>| {
        assert!(answers.iter().any(Result::is_ok));
        assert!(answers.iter().all(|answer| matches!(answer, Ok(()) | Err(Code::Aborted))));
    };
    for round in 0..5 {
        let (one, two) = (&ids[0], &ids[1]);
        let how = || How::mount(&[]);
        let (a, b, c, other) = tokio::join!(
            lab.stage(one, "staging", how()),
            lab.stage(one, "staging", how()),
            lab.stage(one, "staging", how()),
            lab.stage(two, "staging of b", how()),
        );
        other.unwrap();
        settled(vec![a, b, c]);
        lab.stage(one, "staging", how()).await.unwrap();
        assert_eq!(mounts_at(&lab.file("staging")), 1, "{round}");
        let (a, b, c) = tokio::join!(
            lab.publish(one, "one", how(), false),
            lab.publish(one, "one", how(), false),
            lab.publish(one, "two", how(), false),
        );
        settled(vec![a, b, c]);
        let (a, b) = tokio::join!(lab.unpublish(one, "one"), lab.unpublish(one, "one"));
        settled(vec![a, b]);
        lab.unpublish(one, "two").await.unwrap();
        let (a, b) = tokio::join!(lab.unstage(one, "staging"), lab.unstage(one, "staging"));
        settled(vec![a, b]);
        lab.unstage(two, "staging of b").await.unwrap();
        assert!(lab.is_clean(), "{round}");
    }
}

/// A caller that went away does not leave a half of what it asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_caller_is_gone_runs_to_its_end() {
    let Some(lab) = Lab::new() else { return };
    let volume = lab.pool.create("v", 16 * MIB, Filesystem::Ext4);
    let id = lab.id(&volume);
    {
        let stage = lab.stage(&id, "staging", How::mount(&[]));
        let waited = tokio::time::timeout(std::time::Duration::ZERO, stage).await;
        assert!(waited.is_err(), "it takes time");
    }
    // The one that nobody waits for has the volume.
    assert_eq!(lab.unstage(&id, "staging").await, Err(Code::Aborted));
    loop {
        match lab.stage(&id, "staging", How::mount(&[])).await {
            Err(Code::Aborted) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            staged => break staged.unwrap(),
        }
    }
    assert_eq!(mounts_at(&lab.file("staging")), 1);
    lab.unstage(&id, "staging").await.unwrap();
    assert!(lab.is_clean());
}
