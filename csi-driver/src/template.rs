//! Where snapshots go and what they are called: templates over the names that Kubernetes gives.
//!
//! A StorageClass or a snapshot class may have these parameters; those of the snapshot class count more.
//!
//! | parameter | default | without Kubernetes' names |
//! |---|---|---|
//! | `repository` | the first that the driver knows | |
//! | `experiment` | `${pvc.namespace}` | `default` |
//! | `run` | `${pvc.name}` | the volume's name |
//! | `snapshot` | `${snapshot.name}` | the name in the CSI call |
//! | `member` | `${pvc.name}` | the volume's name |
//! | `label.KEY` | | |
//!
//! `--extra-create-metadata` of the sidecars brings the names of the claim and of the snapshot.

use std::collections::{BTreeMap, HashMap};

use petra_engine::Name;
use tonic::Status;

use crate::handle::member_name;

/// How Kubernetes' sidecars call what they tell of a claim or snapshot, and how templates call it.
const WORDS: [(&str, &str); 9] = [
    ("csi.storage.k8s.io/pvc/name", "pvc.name"),
    ("csi.storage.k8s.io/pvc/namespace", "pvc.namespace"),
    ("csi.storage.k8s.io/pv/name", "pv.name"),
    ("csi.storage.k8s.io/volumesnapshot/name", "snapshot.name"),
    ("csi.storage.k8s.io/volumesnapshot/namespace", "snapshot.namespace"),
    ("csi.storage.k8s.io/volumegroupsnapshot/name", "snapshot.name"),
    ("csi.storage.k8s.io/volumegroupsnapshot/namespace", "snapshot.namespace"),
    ("csi.storage.k8s.io/volumesnapshotcontent/name", "snapshotcontent.name"),
    ("csi.storage.k8s.io/volumegroupsnapshotcontent/name", "snapshotcontent.name"),
];
/// What sidecars tell that no template needs.
const FOREIGN: &str = "csi.storage.k8s.io/";
/// The repository of snapshots, by name or URL.
pub const REPOSITORY: &str = "repository";
/// The other parameters of classes.
const EXPERIMENT: &str = "experiment";
const RUN: &str = "run";
const SNAPSHOT: &str = "snapshot";
const MEMBER: &str = "member";
const LABEL: &str = "label.";
/// A snapshot's volume that new volumes are clones of; for volumes only.
pub const FROM: &str = "from";
/// How what a volume was made with is called in its metadata.
const REMEMBERED: &str = "class.";
/// And what it was given later, which counts more.
const ATTRIBUTES: &str = "attributes.";

/// True for what a volume remembers of attributes.
pub fn is_attribute(key: &str) -> bool {
    key.starts_with(ATTRIBUTES)
}

/// Parameters that are understood. An error for others: a typing error must not go unnoticed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Of the class: by the names above.
    class: BTreeMap<String, String>,
    /// What Kubernetes said.
    words: BTreeMap<String, String>,
}

/// Where a snapshot goes and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The repository, by name or URL; None for the default.
    pub repository: Option<String>,
    /// The experiment.
    pub experiment: Name,
    /// The run.
    pub run: Name,
    /// The snapshot's name.
    pub snapshot: Name,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Parameters {
    /// Reads the parameters of a StorageClass (`for_volumes`) or of a snapshot class.
    pub fn read(parameters: &HashMap<String, String>, for_volumes: bool) -> Result<Self, Status> {
        let mut read = Self::default();
        for (key, value) in parameters {
            if let Some((_, word)) = WORDS.iter().find(|(known, _)| known == key) {
                read.words.insert((*word).to_owned(), value.clone());
            } else if key.starts_with(FOREIGN) {
                // For the sidecars.
            } else if [REPOSITORY, EXPERIMENT, RUN, SNAPSHOT, MEMBER].contains(&key.as_str())
                || (for_volumes && key == FROM)
                || key.strip_prefix(LABEL).is_some_and(|label| !label.is_empty())
            {
                read.class.insert(key.clone(), value.clone());
            } else {
                return Err(Status::invalid_argument(format!(
                    "unknown parameter {key:?}: there are {REPOSITORY}, {EXPERIMENT}, {RUN}, {SNAPSHOT}, {MEMBER}, \
                     {LABEL}KEY{}",
                    if for_volumes { ", from" } else { "" }
                )));
            }
        }
        Ok(read)
    }

    /// A parameter of the class.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.class.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// What a volume should remember, to know where its snapshots go.
    pub fn to_metadata(&self) -> BTreeMap<String, String> {
        self.remembered(REMEMBERED)
    }

    /// The same of attributes, which take the place of all those before.
    pub fn to_attributes(&self) -> BTreeMap<String, String> {
        self.remembered(ATTRIBUTES)
    }

    fn remembered(&self, how: &str) -> BTreeMap<String, String> {
        let class = self.class.iter().filter(|(key, _)| *key != FROM);
        let class = class.map(|(key, value)| (format!("{how}{key}"), value.clone()));
        class.chain(self.words.clone()).collect()
    }

    /// The same from the metadata of a volume.
    pub fn of_metadata<'a>(metadata: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let (mut read, mut attributes) = (Self::default(), Self::default());
        for (key, value) in metadata {
            if let Some(key) = key.strip_prefix(REMEMBERED) {
                read.class.insert(key.to_owned(), value.clone());
            } else if let Some(key) = key.strip_prefix(ATTRIBUTES) {
                attributes.class.insert(key.to_owned(), value.clone());
            } else if WORDS.iter().any(|(_, word)| word == key) {
                read.words.insert(key.clone(), value.clone());
            }
        }
        attributes.over(&read)
    }

    /// These, and of the others what these do not say.
    pub fn over(mut self, others: &Self) -> Self {
        for (key, value) in &others.class {
            self.class.entry(key.clone()).or_insert_with(|| value.clone());
        }
        for (word, value) in &others.words {
            self.words.entry(word.clone()).or_insert_with(|| value.clone());
        }
        self
    }

    /// Where a snapshot goes. `name` is its name in the CSI call, `volume` that of a volume of it.
    pub fn place(&self, name: &str, volume: &str) -> Result<Place, Status> {
        let labels = self.class.iter().filter_map(|(key, value)| {
            let label = key.strip_prefix(LABEL)?;
            Some(self.fill(value, volume).map(|value| (label.to_owned(), value)))
        });
        Ok(Place {
            repository: self.get(REPOSITORY).map(str::to_owned),
            experiment: self.name(EXPERIMENT, "pvc.namespace", "default", volume)?,
            run: self.name(RUN, "pvc.name", volume, volume)?,
            snapshot: self.name(SNAPSHOT, "snapshot.name", name, volume)?,
            labels: labels.collect::<Result<_, _>>()?,
        })
    }

    /// What a volume is called in a snapshot.
    pub fn member(&self, volume: &str) -> Result<Name, Status> {
        self.name(MEMBER, "pvc.name", volume, volume).map(|name| member_name(name.as_str()))
    }

    fn name(
        &self,
        parameter: &'static str,
        word: &str,
        otherwise: &str,
        volume: &str,
    ) -> Result<Name, Status> {
        let text = match self.get(parameter) {
            Some(template) => self.fill(template, volume)?,
            None => self.words.get(word).map_or_else(|| otherwise.to_owned(), Clone::clone),
        };
        Name::new(parameter, text).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    /// Puts names into a template.
    fn fill(&self, template: &str, volume: &str) -> Result<String, Status> {
        let mut filled = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once("${") {
            filled.push_str(before);
            let invalid =
                |what: &str| Status::invalid_argument(format!("the template {template:?} {what}"));
            let (word, after) = after.split_once('}').ok_or_else(|| invalid("lacks a }"))?;
            match (word, self.words.get(word)) {
                (_, Some(value)) => filled.push_str(value),
                ("volume", None) => filled.push_str(volume),
                (word, None) if WORDS.iter().any(|(_, known)| *known == word) => {
                    return Err(invalid(&format!(
                        "needs {word}, which was not told: run the sidecar with --extra-create-metadata"
                    )));
                }
                (word, None) => return Err(invalid(&format!("names {word}, which there is not"))),
            }
            rest = after;
        }
        filled.push_str(rest);
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(pairs: &[(&str, &str)], for_volumes: bool) -> Result<Parameters, Status> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Parameters::read(&pairs.collect(), for_volumes)
    }

    const CLAIM: [(&str, &str); 2] =
        [("csi.storage.k8s.io/pvc/name", "data"), ("csi.storage.k8s.io/pvc/namespace", "team")];

    #[test]
    fn defaults_follow_kubernetes_names() {
        let volume = parameters(&CLAIM, true).unwrap();
        let class =
            parameters(&[("csi.storage.k8s.io/volumesnapshot/name", "monday")], false).unwrap();
        let remembered = Parameters::of_metadata(&volume.to_metadata());
        let all = class.over(&remembered);
        let place = all.place("snapshot-1", "pvc-1").unwrap();
        let names = [&place.experiment, &place.run, &place.snapshot].map(Name::as_str);
        assert_eq!(names, ["team", "data", "monday"]);
        assert_eq!(all.member("pvc-1").unwrap().as_str(), "data");
    }

    #[test]
    fn there_are_names_without_kubernetes() {
        let nothing = Parameters::default();
        let place = nothing.place("snapshot-1", "v").unwrap();
        let names = [&place.experiment, &place.run, &place.snapshot].map(Name::as_str);
        assert_eq!(names, ["default", "v", "snapshot-1"]);
        assert_eq!(nothing.member("v").unwrap().as_str(), "v");
    }

    #[test]
    fn snapshot_classes_count_more() {
        let volume = [("experiment", "${pvc.namespace}-a"), ("label.phase", "x"), ("run", "r")];
        let volume = parameters(&[&CLAIM[..], &volume].concat(), true).unwrap();
        let class = [("experiment", "b-${pvc.name}-${volume}"), ("label.owner", "${pvc.name}")];
        let place = parameters(&class, false).unwrap().over(&volume).place("s", "v").unwrap();
        assert_eq!((place.experiment.as_str(), place.run.as_str()), ("b-data-v", "r"));
        let labels: Vec<_> = place.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(labels, [("owner", "data"), ("phase", "x")]);
    }

    #[test]
    fn attributes_count_more_than_the_storage_class() {
        let volume = [("run", "r"), ("label.phase", "x"), ("label.owner", "y")];
        let mut metadata = parameters(&[&CLAIM[..], &volume].concat(), true).unwrap().to_metadata();
        let attributes = [("run", "${pvc.name}-2"), ("label.phase", "z")];
        metadata.extend(parameters(&attributes, false).unwrap().to_attributes());
        let place = Parameters::of_metadata(&metadata).place("s", "v").unwrap();
        assert_eq!((place.experiment.as_str(), place.run.as_str()), ("team", "data-2"));
        let labels: Vec<_> = place.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(labels, [("owner", "y"), ("phase", "z")]);
        metadata.retain(|key, _| !is_attribute(key));
        let place = Parameters::of_metadata(&metadata).place("s", "v").unwrap();
        assert_eq!((place.run.as_str(), place.labels["phase"].as_str()), ("r", "x"));
    }

    #[test]
    fn mistakes_are_told() {
        let told = |pairs: &[(&str, &str)]| {
            let refused = parameters(pairs, false)
                .and_then(|parameters| parameters.place("s", "v"))
                .unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            refused.message().to_owned()
        };
        assert!(told(&[("experimnt", "x")]).contains("unknown parameter"));
        assert!(told(&[("from", "x")]).contains("unknown parameter"));
        assert!(told(&[("run", "${pvc.name}")]).contains("extra-create-metadata"));
        assert!(told(&[("run", "${pvc.nam}")]).contains("there is not"));
        assert!(told(&[("run", "${pvc.name")]).contains("lacks"));
        assert!(told(&[("run", "a/b")]).contains("separates"));
    }
}
