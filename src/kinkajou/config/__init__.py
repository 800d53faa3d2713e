"""Every setting: a field is a TOML key and a command-line flag of the same name; its docstring is the help."""

from kinkajou.config.dialects import ALGORITHMS, DIALECTS
from kinkajou.config.groups import (
    NO_OUTPUT,
    NO_RECORDS,
    UNBOUNDED,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from kinkajou.config.keep import KeepConfig
from kinkajou.config.parallel import STRATEGIES, STRATEGY_ALIASES, EngineConfig, ParallelConfig
from kinkajou.config.preference import PreferConfig, PreferenceLossConfig
from kinkajou.config.recipes import check_texts, flat, from_flat, read_recipe, to_toml, toml_value
from kinkajou.config.records import RewardConfig, SFTConfig
from kinkajou.config.rl import (
    ClipConfig,
    GRPOAlgorithm,
    GRPOConfig,
    GRPONumerics,
    JudgeConfig,
    KLConfig,
    PPOAlgorithm,
    PPOConfig,
    PPONumerics,
    PtxConfig,
    RLConfig,
    RLOptimConfig,
    RolloutConfig,
    ShapingConfig,
    SurrogateConfig,
)
from kinkajou.config.serving import DoorConfig, ExportConfig, HostingConfig, QuantizeConfig, ServeConfig
from kinkajou.config.tools import (
    ChatConfig,
    CheckConfig,
    DemoConfig,
    EvalRewardConfig,
    PlanConfig,
    ProfileConfig,
    SampleConfig,
)

StageConfig = SFTConfig | RewardConfig | PreferConfig | PPOConfig | GRPOConfig

__all__ = [
    "ALGORITHMS",
    "DIALECTS",
    "NO_OUTPUT",
    "NO_RECORDS",
    "STRATEGIES",
    "STRATEGY_ALIASES",
    "UNBOUNDED",
    "ChatConfig",
    "CheckConfig",
    "ClipConfig",
    "DataConfig",
    "DemoConfig",
    "DoorConfig",
    "EngineConfig",
    "EvalRewardConfig",
    "ExportConfig",
    "GRPOAlgorithm",
    "GRPOConfig",
    "GRPONumerics",
    "HostingConfig",
    "JudgeConfig",
    "KLConfig",
    "KeepConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOAlgorithm",
    "PPOConfig",
    "PPONumerics",
    "ParallelConfig",
    "PlanConfig",
    "PreferConfig",
    "PreferenceLossConfig",
    "ProfileConfig",
    "PtxConfig",
    "QuantizeConfig",
    "RLConfig",
    "RLOptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SampleConfig",
    "ServeConfig",
    "ShapingConfig",
    "StageConfig",
    "SurrogateConfig",
    "check_texts",
    "flat",
    "from_flat",
    "read_recipe",
    "to_toml",
    "toml_value",
]
